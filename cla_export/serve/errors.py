"""Errors as OpenAI's clients expect them: a status, and a body that names the parameter."""

from collections.abc import Mapping

from cla_export.serve.engine import Engine, NotReady, QueueFull, State
from cla_export.serve.requests import (
    BAD_LOGITS,
    CANCELLED,
    DEAD,
    SHUTDOWN,
    STALLED,
    STEP_FAILED,
    TIMEOUT,
    Failure,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NO_RETRY = {"x-should-retry": "false"}  # clients of OpenAI's retry any status of 500 and above
SOON = "5"  # seconds, where a restart is likely
_FAILURES: Mapping[str, tuple[int, Mapping[str, str]]] = {
    TIMEOUT: (504, _NO_RETRY),
    BAD_LOGITS: (500, _NO_RETRY),
    STEP_FAILED: (500, {}),
    DEAD: (503, {"retry-after": SOON}),
    STALLED: (503, {"retry-after": SOON}),
    SHUTDOWN: (503, {"retry-after": SOON}),
    CANCELLED: (499, {}),  # nobody is there to read it
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for a person.
        param: the field of the body that is wrong.
        code: for a program.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {
            "error": {
                "message": _speakable(message),
                "type": _TYPES.get(status, "api_error"),
                "param": None if param is None else _speakable(param),
                "code": code,
            }
        }


def _speakable(text: str) -> str:
    """Text that can be sent: JSON may bring half of a surrogate pair, UTF-8 has no such thing."""
    return text.encode("utf-8", "replace").decode()


def from_failure(failure: Failure) -> ApiError:
    """The answer for a sequence that the engine ended early."""
    status, headers = _FAILURES[failure.kind]
    return ApiError(status, failure.message, code=failure.kind, headers=headers)


def from_refusal(error: QueueFull | NotReady) -> ApiError:
    """The answer for requests that the engine does not take now."""
    if isinstance(error, QueueFull):
        headers = {"retry-after": str(error.retry_after)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    code = "engine_dead" if error.state == State.dead else "not_ready"
    return ApiError(503, str(error), code=code, headers={"retry-after": SOON})


def check_room(engine: Engine) -> None:
    """Raise ApiError where an engine would not even take the smallest request now."""
    try:
        engine.check_room()
    except (QueueFull, NotReady) as error:
        raise from_refusal(error) from error
