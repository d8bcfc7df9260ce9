"""From a checked body to what the engine is asked, whatever protocol the body came by."""

import secrets
from collections.abc import Mapping
from typing import Any

from cla_export.errors import BadInput
from cla_export.sampling import SamplingParams
from cla_export.serve.bodies import Generation, Prompt
from cla_export.serve.errors import ApiError
from cla_export.serve.model import ServedModel
from cla_export.serve.requests import Request

_SEEDS = 2**63


def encode(model: ServedModel, prompt: Prompt, add_special_tokens: bool) -> list[int]:
    """A prompt's token ids. ApiError for a text that the model has no tokenizer for."""
    if not isinstance(prompt, str):
        return list(prompt)
    if model.tokenizer is None:
        raise ApiError(
            400,
            "this model has no tokenizer; give prompts as token ids",
            param="prompt",
            code="no_tokenizer",
        )
    return model.encode(prompt, add_special_tokens=add_special_tokens)


def make_request(
    model: ServedModel,
    body: Generation,
    prompt: list[int],
    max_tokens: int,
    deadline: float,
    *,
    choice: int = 0,
    tenant: str = "",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    """One sequence of a body; `deadline` is by the engine's clock. ApiError if it cannot be."""
    if body.min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens is {body.min_tokens}, which is more than the {max_tokens} of max_tokens",
            param="min_tokens",
        )
    too_large = [token for token in body.logit_bias if int(token) >= model.vocab_size]
    if too_large:
        raise ApiError(
            400,
            f"logit_bias has token id {too_large[0]}; expected 0 to {model.vocab_size - 1}",
            param="logit_bias",
        )
    try:
        sampling = SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in body.logit_bias.items()),
            seed=secrets.randbelow(_SEEDS) if body.seed is None else body.seed,
        )
    except BadInput as error:
        raise ApiError(400, str(error), param=str(error).split(maxsplit=1)[0]) from error
    return Request(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        choice=choice,
        stop=tuple(body.stop),
        stop_tokens=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        skip_special_tokens=body.skip_special_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stream=body.stream,
        deadline=deadline,
        tenant=tenant,
    )


def check_length(model: ServedModel, request: Request, param: str) -> None:
    """ApiError for a request that no slot holds; `param` is the prompt's field."""
    if request.prompt and request.total > model.capacity:
        raise ApiError(
            400,
            f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} are asked "
            f"for, {request.total} together; this model's limit is {model.capacity}",
            param=param if len(request.prompt) >= model.capacity else "max_tokens",
            code="context_length_exceeded",
        )


def from_fault(fault: Mapping[str, Any]) -> ApiError:
    """400 for a body's fault, as pydantic tells it; never what was in the body."""
    place = [str(part) for part in fault["loc"] if part != "body"]
    param, code = ".".join(place) or None, None
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {message}", code="invalid_json")
    if fault["type"] in ("model_attributes_type", "missing") and not place:
        message = "expected a JSON object, with content-type application/json"
        return ApiError(400, f"the body: {message}", code="invalid_json")
    if fault["type"] == "extra_forbidden":
        code, message = "unsupported_parameter", "this server does not have this parameter"
    elif param is None and ": " in message:  # fields that do not fit together name themselves
        param, message = message.split(": ", 1)
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)
