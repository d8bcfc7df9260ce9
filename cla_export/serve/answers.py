"""Answers in OpenAI's shapes, from the engine's outputs."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cla_export.serve.logprobs import TokenLogprob
from cla_export.serve.model import ServedModel
from cla_export.serve.requests import Finish, Output, Request

Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Tokens of a body, as they are so far. A prompt counts once, however many choices it has."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def add(self, output: Output, choice: int) -> None:
        self.completion += len(output.tokens)
        if output.finish is not None and choice == 0:
            self.cached += output.finish.cached_tokens

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Answer:
    """What all chunks of an answer, or the whole of it, have in common."""

    model: ServedModel
    kind: str  # object
    prefix: str  # of the id
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.created = int(time.time())

    def to_json(self, choices: list[Json], kind: str | None = None) -> Json:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }


def join(outputs: Iterable[Output]) -> Output:
    """Several outputs of one sequence as one."""
    found = list(outputs)
    return Output(
        "".join(output.text for output in found),
        tuple(token for output in found for token in output.tokens),
        tuple(entry for output in found for entry in output.logprobs),
        tuple(entry for output in found for entry in output.prompt_logprobs),
        found[-1].finish,
    )


def ending(finish: Finish | None) -> Json:
    """How a choice ended; nulls while it has not."""
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stopped_by}


class CompletionChoice:
    """One choice of /v1/completions; `told` is characters of its text so far."""

    def __init__(self, model: ServedModel, request: Request, index: int, echo: str | None) -> None:
        self._model = model
        self._request = request
        self._index = index
        self._echo = echo  # the prompt's text, not told yet
        self._told = 0

    def to_json(self, output: Output, *, ids: bool) -> Json:
        """What an output adds to the choice."""
        text = (self._echo or "") + output.text
        choice: Json = {"index": self._index, "text": text, "logprobs": None}
        if self._request.logprobs is not None:
            entries: list[tuple[int, TokenLogprob | None]] = []
            if self._echo is not None:
                prompt = zip(self._request.prompt, output.prompt_logprobs, strict=True)
                entries += list(prompt)
            entries += [(entry.token, entry) for entry in output.logprobs]
            choice["logprobs"] = self._logprobs(entries)
        if ids:
            choice["token_ids"] = list(output.tokens)
            if self._echo is not None:
                choice["prompt_token_ids"] = list(self._request.prompt)
        self._echo = None
        return choice | ending(output.finish)

    def _logprobs(self, entries: list[tuple[int, TokenLogprob | None]]) -> Json:
        tokens, offsets, tops = [], [], []
        for token, entry in entries:
            text = token_text(self._model, token)
            tokens.append(text)
            offsets.append(self._told)
            self._told += len(text)
            top: dict[str, float] = {}
            for other, logprob in () if entry is None else entry.top:
                top.setdefault(token_text(self._model, other), logprob)
            tops.append(None if entry is None else top)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for _, entry in entries],
            "top_logprobs": tops if self._request.logprobs else None,
            "text_offset": offsets,
        }


def chat_logprobs(model: ServedModel, entries: Iterable[TokenLogprob]) -> Json:
    """`logprobs` of a chat's choice."""

    def one(token: int, logprob: float) -> Json:
        text = token_text(model, token)
        broken = "\N{REPLACEMENT CHARACTER}" in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if broken else list(text.encode()),
        }

    return {
        "content": [
            one(entry.token, entry.logprob) | {"top_logprobs": [one(*top) for top in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def token_text(model: ServedModel, token: int) -> str:
    return model.decode([token], skip_special_tokens=False)


def model_card(model: ServedModel) -> Mapping[str, object]:
    """An entry of /v1/models."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "cla-export",
        "max_model_len": model.capacity,
    }
