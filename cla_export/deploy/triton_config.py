"""What a bundle's model looks like to Triton: its tensors, its parameters, config.pbtxt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cla_export.errors import BadInput
from cla_export.planning import parse_bytes
from cla_export.serve.engine import Limits
from cla_export.serve.server import Options

CONFIG = "config.pbtxt"


class Parameters(BaseModel):
    """How a model is served: the parameters of its config.pbtxt, options of `cla-export serve`.

    Paths are absolute, or begin in the version's folder. Times are seconds, `prefill_budget` in ms.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend: str | None = None
    engine: str | None = None
    slots: int | None = None
    kv_memory: str | None = None
    max_len: int | None = None
    chunk: int | None = None
    prefill_budget: float | None = None
    threads: int | None = None
    max_queued_requests: int = Limits().queued_requests
    max_queued_tokens: int = Limits().queued_tokens
    step_timeout: float = Limits().step_seconds
    request_timeout: float = Options().request_seconds

    def to_options(self, version_folder: Path) -> Options:
        """Options of the server that a model is. BadInput for a memory that is no size."""
        return Options(
            backend=self.backend,
            engine=None if self.engine is None else version_folder / self.engine,
            slots=self.slots,
            kv_memory=None if self.kv_memory is None else parse_bytes(self.kv_memory),
            max_len=self.max_len,
            chunk=self.chunk,
            prefill_seconds=None if self.prefill_budget is None else self.prefill_budget / 1000,
            threads=self.threads,
            limits=Limits(self.max_queued_requests, self.max_queued_tokens, self.step_timeout),
            request_seconds=self.request_timeout,
        )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `many` is a list of any length, else there is one element."""

    name: str
    triton_type: str
    many: bool = False

    def to_text(self, *, optional: bool) -> str:
        """An entry of config.pbtxt."""
        dims = -1 if self.many else 1
        may_miss = ", optional: true" if optional else ""
        return (
            f'{{ name: "{self.name}", data_type: {self.triton_type}, dims: [ {dims} ]{may_miss} }}'
        )


# All are optional; a prompt comes in the one or the other of the first two. The rest are fields of
# `serve.bodies.CompletionBody`, and mean the same.
INPUTS = (
    TensorSpec("text_input", "TYPE_STRING"),
    TensorSpec("input_ids", "TYPE_INT64", many=True),
    TensorSpec("max_tokens", "TYPE_INT32"),
    TensorSpec("stream", "TYPE_BOOL"),
    TensorSpec("temperature", "TYPE_FP32"),
    TensorSpec("top_p", "TYPE_FP32"),
    TensorSpec("top_k", "TYPE_INT32"),
    TensorSpec("min_p", "TYPE_FP32"),
    TensorSpec("seed", "TYPE_INT64"),
    TensorSpec("stop", "TYPE_STRING", many=True),
    TensorSpec("stop_token_ids", "TYPE_INT64", many=True),
    TensorSpec("ignore_eos", "TYPE_BOOL"),
    TensorSpec("min_tokens", "TYPE_INT32"),
    TensorSpec("repetition_penalty", "TYPE_FP32"),
    TensorSpec("presence_penalty", "TYPE_FP32"),
    TensorSpec("frequency_penalty", "TYPE_FP32"),
    TensorSpec("add_special_tokens", "TYPE_BOOL"),
    TensorSpec("skip_special_tokens", "TYPE_BOOL"),
)
OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING"),  # what is new, whole characters
    TensorSpec("token_ids", "TYPE_INT64", many=True),  # those it is of
    TensorSpec("finish_reason", "TYPE_STRING"),  # stop or length; empty: more follows
    TensorSpec("prompt_tokens", "TYPE_INT32"),
    TensorSpec("completion_tokens", "TYPE_INT32"),  # so far
    TensorSpec("cached_tokens", "TYPE_INT32"),  # of the prompt; known at the end
)


def config_text(parameters: Parameters) -> str:
    """config.pbtxt of a model; of the parameters, those that differ from the defaults."""
    given = parameters.model_dump(exclude_defaults=True)
    entries = [
        f"parameters {{ key: {_quote(key)}, value: {{ string_value: {_quote(str(value))} }} }}"
        for key, value in given.items()
    ]
    inputs = [f"input {spec.to_text(optional=True)}" for spec in INPUTS]
    outputs = [f"output {spec.to_text(optional=False)}" for spec in OUTPUTS]
    lines = [
        "# Written by `cla-export deploy triton`. One instance is one engine with its own KV pool:",
        "# it batches whatever requests run, so Triton's own batching stays off.",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "instance_group { count: 1, kind: KIND_MODEL }",
        *entries,
        *inputs,
        *outputs,
    ]
    return "\n".join(lines) + "\n"


def read_parameters(config: Mapping[str, Any]) -> Parameters:
    """The parameters in a model's configuration, as Triton gives it, in JSON's form.

    BadInput if one is missing, not known, or of the wrong kind.
    """
    given = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
    # Those for Triton's Python backend itself are in capitals.
    ours = {key: value for key, value in given.items() if not key.isupper()}
    try:
        return Parameters.model_validate(ours)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        expected = ", ".join(Parameters.model_fields)
        raise BadInput(
            f"{CONFIG}, parameter {name!r}: {fault['msg']}; the parameters are {expected}"
        ) from error


def _quote(text: str) -> str:
    """A string of protobuf's text format, whose escapes JSON's are a part of."""
    return json.dumps(text, ensure_ascii=False)
