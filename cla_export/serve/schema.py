"""What the OpenAPI document says of answers: the shapes that `answers` makes, and of errors."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

_ERRORS = {
    400: "A parameter is wrong or not supported, or the prompt does not fit.",
    401: "The API key is missing or not known.",
    404: "There is no such model.",
    413: "The body is too long.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "A step failed, or gave no numbers.",
    503: "The model is loading, the server drains, or its engine is dead; see Retry-After.",
    504: "The request's time was up.",
}


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Fault(_Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Shape):
    """Every error of the API."""

    error: _Fault


class CachedTokens(_Shape):
    cached_tokens: int


class UsageAnswer(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class _Choice(_Shape):
    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] = []


class CompletionChoiceAnswer(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []


class _Answer(_Shape):
    id: str
    created: int
    model: str
    usage: UsageAnswer


class CompletionAnswer(_Answer):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoiceAnswer]


class _ChatToken(_Shape):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(_ChatToken):
    top_logprobs: list[_ChatToken]


class ChatLogprobs(_Shape):
    content: list[ChatToken]
    refusal: None


class ChatMessage(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoiceAnswer(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(_Answer):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoiceAnswer]


class ModelCard(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Shape):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Shape):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(_Shape):
    """POST /detokenize."""

    prompt: str


class StatusAnswer(_Shape):
    """GET /health and /ready."""

    status: str


class VersionAnswer(_Shape):
    """GET /version."""

    version: str


METRICS = {"description": "In Prometheus' text format.", "content": {"text/plain": {}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """An endpoint's `responses` that are errors; any may be refused by the gate in front of it."""
    return {
        status: {"model": ErrorAnswer, "description": _ERRORS[status]}
        for status in sorted({401, 413, 503, *statuses})
    }


def answered(model: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """An endpoint's `responses` where it generates."""
    done: dict[str, Any] = {"model": model, "description": "The answer."}
    if stream:
        done["description"] = "The answer; with `stream`, as server-sent events of its chunks."
        done["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: done, **errors(400, 404, 429, 500, 504)}


def document(schema: dict[str, Any], model: str) -> dict[str, Any]:
    """An OpenAPI document as it should be.

    Invalid bodies are answered 400, a key may be needed, and there is one model.
    """
    only = {"type": "string", "const": model}
    components = schema.setdefault("components", {})
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = only  # /v1/models/{name}
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for body in ("CompletionBody", "ChatBody", "TokenizeBody", "DetokenizeBody"):
        components["schemas"][body]["properties"]["model"] = {"anyOf": [only, {"type": "null"}]}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{}, {"key": []}]
    return schema
