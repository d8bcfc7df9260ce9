"""Between Triton's tensors and the server's terms. Importable only in Triton's Python backend."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from pydantic import ValidationError

from cla_export.deploy.triton_config import INPUTS, TensorSpec
from cla_export.serve.answers import Usage
from cla_export.serve.bodies import CompletionBody
from cla_export.serve.errors import ApiError
from cla_export.serve.intake import from_fault
from cla_export.serve.requests import Output

PROMPTS = ("text_input", "input_ids")
_CODES = {  # statuses of HTTP, which Triton turns its codes into again
    400: "INVALID_ARG",
    429: "UNAVAILABLE",
    499: "CANCELLED",
    503: "UNAVAILABLE",
}


def read_body(request: Any) -> CompletionBody:  # noqa: ANN401
    """What a request asks for, in the terms of /v1/completions. ApiError if it cannot be read."""
    unknown = [
        key for key in json.loads(request.parameters() or "{}") if not key.startswith("triton_")
    ]
    if unknown:
        names = ", ".join(spec.name for spec in INPUTS)
        raise ApiError(
            400,
            f"{unknown[0]}: this model does not have this input; it has {names}",
            param=unknown[0],
        )
    given: dict[str, object] = {}
    for spec in INPUTS:
        tensor = pb.get_input_tensor_by_name(request, spec.name)
        if tensor is not None:
            given[spec.name] = _to_python(spec, tensor.as_numpy())
    prompts = [given.pop(name) for name in PROMPTS if name in given]
    if len(prompts) != 1:
        raise ApiError(
            400,
            f"{' and '.join(PROMPTS)}: {len(prompts)} of them were given; expected one of the two",
            param=PROMPTS[0],
        )
    try:
        return CompletionBody.model_validate({"prompt": prompts[0], **given})
    except ValidationError as error:
        raise from_fault(_of_triton(error.errors()[0])) from error


def to_response(output: Output, usage: Usage) -> Any:  # noqa: ANN401
    """A response that tells an output, of a request that used so many tokens up to it."""
    reason = "" if output.finish is None else output.finish.reason
    return pb.InferenceResponse(
        output_tensors=[
            pb.Tensor("text_output", _strings(output.text)),
            pb.Tensor("token_ids", np.array(output.tokens, np.int64)),
            pb.Tensor("finish_reason", _strings(reason)),
            pb.Tensor("prompt_tokens", np.array([usage.prompt], np.int32)),
            pb.Tensor("completion_tokens", np.array([usage.completion], np.int32)),
            pb.Tensor("cached_tokens", np.array([usage.cached], np.int32)),
        ]
    )


def to_error(error: ApiError) -> Any:  # noqa: ANN401
    """A response that says what went wrong."""
    code = getattr(pb.TritonError, _CODES.get(error.status, "INTERNAL"))
    return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(str(error), code))


def _to_python(spec: TensorSpec, values: Any) -> object:  # noqa: ANN401
    """A tensor's element, or the list of them."""
    if spec.triton_type == "TYPE_STRING":
        try:
            found = [value.decode() for value in values.ravel()]
        except UnicodeDecodeError as error:
            raise ApiError(400, f"{spec.name}: not UTF-8 ({error})", param=spec.name) from error
    elif spec.triton_type == "TYPE_FP32":
        # The shortest number that rounds to it: 0.7 of a client's JSON is 0.7 here too, and a seed
        # gives the same text as over HTTP.
        found = [float(str(value)) for value in values.ravel()]
    else:
        found = values.ravel().tolist()
    return found if spec.many else found[0]


def _of_triton(fault: Mapping[str, Any]) -> dict[str, Any]:
    """A fault whose place is named as the input is."""
    place = [PROMPTS[1] if part == "prompt" else part for part in fault["loc"]]
    return {**fault, "loc": place}


def _strings(text: str) -> Any:  # noqa: ANN401
    return np.array([text.encode()], np.object_)
