"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field

from cla_export.sampling import SamplingParams
from cla_export.serve.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate.

    Times are seconds of the engine's clock. `choice` tells sequences of one body and seed apart.
    `tenant` names who may share a cached prefix: prompts of different tenants never meet.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None  # likeliest tokens to tell beside each; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens
    stream: bool = False  # tell each piece as it comes; else everything at the end
    deadline: float | None = None
    tenant: str = ""

    @property
    def total(self) -> int:
        """Tokens that it may come to, prompt included."""
        return len(self.prompt) + self.max_tokens

    @property
    def plain_prompt(self) -> bool:
        """Whether nothing is wanted of its prompt but the token after it."""
        return self.max_tokens > 0 and self.prompt_logprobs is None


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sequence ended. `reason` is `stop` or `length`, `stopped_by` a string or a token."""

    reason: str
    stopped_by: str | int | None
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in a cache


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence ended early. `kind` is one of the constants below."""

    kind: str
    message: str


TIMEOUT = "timeout"
CANCELLED = "cancelled"
BAD_LOGITS = "bad_logits"  # the model gave no numbers for this row
STEP_FAILED = "step_failed"  # the executor raised
DEAD = "engine_dead"
STALLED = "engine_stalled"
SHUTDOWN = "shutting_down"


@dataclass(frozen=True, slots=True)
class Output:
    """What came since the last one: whole characters, the tokens they are of, and the end."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # once; None: the first token's
    finish: Finish | None = None
    failure: Failure | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.failure is not None
