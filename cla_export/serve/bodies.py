"""The bodies of requests. What a field means is OpenAI's; those of `Extensions` are vLLM's.

A field that is not here is refused by its name, never ignored; null is the same as leaving it out.
"""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Prompt = str | list[int]
_STOPS = 16  # strings at most
Schema = dict[str, Any]

# What is taken before validators bring it into one form.
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP: Schema = {"anyOf": [_SOME_TEXT, {"type": "array", "items": _SOME_TEXT, "maxItems": _STOPS}]}
_PROMPT: Schema = {
    "anyOf": [
        _SOME_TEXT,
        _IDS,
        {"type": "array", "minItems": 1, "items": {"anyOf": [_SOME_TEXT, _IDS]}},
    ]
}
_BIAS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]+$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


def _as(schema: Schema) -> Callable[[Schema], None]:
    """Say this of a field, in place of its type after validators."""

    def change(field: Schema) -> None:
        for key in ("type", "items", "additionalProperties"):
            field.pop(key, None)
        field.update(schema)

    return change


def _allow_nulls(schema: Schema) -> None:
    """Say of every field that may be left out that it may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get(
            "anyOf", ()
        ):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(BaseModel):
    """Strict: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_allow_nulls)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:  # noqa: ANN401
        if not isinstance(content, dict):
            return content
        return {key: value for key, value in content.items() if value is not None}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Extensions(Body):
    """What OpenAI's API does not have."""

    top_k: int = Field(0, ge=-1)  # 0 and -1: all tokens
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: list[int] = []
    skip_special_tokens: bool = True
    return_token_ids: bool = False


class Generation(Extensions):
    """What completions and chats share."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: list[str] = Field([], json_schema_extra=_as(_STOP))
    seed: int | None = None
    logit_bias: dict[str, float] = Field({}, json_schema_extra=_as(_BIAS))
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    user: str | None = None  # who the client says it acts for; nothing depends on it

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:  # noqa: ANN401
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and (len(stops) > _STOPS or "" in stops):
            raise ValueError(f"expected at most {_STOPS} strings, none of them empty")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        for token, value in bias.items():
            if not (token.isascii() and token.isdigit() and abs(value) <= 100):
                raise ValueError(
                    f"{token!r}: {value}; expected token ids, each with a number from -100 to 100"
                )
        return bias


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: list[Prompt] = Field(json_schema_extra=_as(_PROMPT))
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = True
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _a_list_of_prompts(cls, prompt: Any) -> Any:  # noqa: ANN401
        one = isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        )
        prompts = [prompt] if one else prompt
        if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
            raise ValueError("expected a string, a list of token ids, or a list of such")
        return prompts

    @model_validator(mode="after")
    def _fit_together(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: {self.best_of}; only n of n are supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 without echo asks for nothing")
        return self


class Part(Body):
    """A part of a message. Others than text are refused by their type."""

    type: Literal["text"]
    text: str


class Message(Body):
    role: str
    content: str | list[Part] = ""
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Of answers. There is no other than text."""

    type: Literal["text"]


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self


class TokenizeBody(Body):
    """POST /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, list):
        return all(type(token) is int for token in prompt)
    return isinstance(prompt, str)
