"""One request while it runs: its tokens, its text, and when it is done."""

from collections.abc import Sequence as Row

from cla_export.engines.executor import Logits
from cla_export.sampling import Sampler
from cla_export.serve.detokenizer import Decode, Detokenizer
from cla_export.serve.logprobs import TokenLogprob, logprob_of
from cla_export.serve.requests import Failure, Finish, Output, Request
from cla_export.serve.stopping import StopMatcher


class Sequence:
    """A request's state.

    Args:
        number: by which the engine and whoever asked know it.
        request: what was asked.
        ends: the model's own end tokens.
        decode: tokens to text; None: there is no text, and stop strings are never found.
        arrived: when, in seconds of the engine's clock.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        ends: frozenset[int],
        decode: Decode | None,
        arrived: float = 0.0,
    ) -> None:
        self.number = number
        self.request = request
        self.tokens = list(request.prompt)  # and what was generated
        self.slot = -1  # none yet
        self.length = 0  # tokens that its slot holds
        self.cached = 0  # of those, found there
        self.arrived, self.admitted, self.first_token, self.last_token = arrived, 0.0, 0.0, 0.0
        self._ends = request.stop_tokens | (frozenset() if request.ignore_eos else ends)
        self.sampler = Sampler(
            request.sampling,
            request.prompt,
            choice=request.choice,
            barred=sorted(self._ends),
            barred_for=request.min_tokens,
        )
        self._text = Detokenizer(decode, request.prompt) if decode is not None else None
        self._stop = StopMatcher(request.stop)
        self._ready = ""  # text, tokens and logprobs that were not told yet
        self._new: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = []
        self.finish: Finish | None = None

    @property
    def made(self) -> int:
        """Tokens generated."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prompt_done(self) -> bool:
        """Whether its slot holds the whole prompt."""
        return self.length >= len(self.request.prompt)

    def ends_plainly(self, piece: Row[int]) -> bool:
        """Whether a piece is the last of its prompt, and nothing but a token is wanted of it."""
        last = self.length + len(piece) == len(self.request.prompt)
        return last and self.request.plain_prompt

    def read_prompt(self, start: int, logits: Logits) -> None:
        """Note the prompt's own logprobs from a chunk's logits [S, V], where they were asked."""
        top = self.request.prompt_logprobs
        if top is None:
            return
        if start == 0:
            self._prompt_logprobs.append(None)  # nothing comes before the first
        for row, at in zip(logits, range(start + 1, len(self.request.prompt)), strict=False):
            self._prompt_logprobs.append(logprob_of(row, self.request.prompt[at], top))

    @property
    def wants_logits(self) -> bool:
        """Whether `add` needs them."""
        return self.request.logprobs is not None

    def add(self, token: int, logits: Logits | None) -> None:
        """Take the token that was chosen by logits [V], if it wants them.

        Sets `finish` if it is the last.
        """
        self.tokens.append(token)
        self._new.append(token)
        if self.request.logprobs is not None:
            assert logits is not None
            self._logprobs.append(logprob_of(logits, token, self.request.logprobs))
        if token in self._ends:
            self._end("stop", token if token in self.request.stop_tokens else None)
            return
        if self._text is not None:
            piece = self._text.add(token)
            early = self.made <= self.request.min_tokens
            self._ready += piece if early else self._stop.add(piece)
            if self._stop.found is not None:
                self._end("stop", self._stop.found)
                return
        if self.made >= self.request.max_tokens:
            self._end("length", None)

    def end_without_tokens(self) -> None:
        """Finish a request for no tokens at all, whose prompt was read."""
        self._end("length", None)

    def output(self) -> Output | None:
        """What is to be told now; None: nothing yet."""
        news = self._ready if self._text is not None else self._new
        if self.finish is None and not (self.request.stream and news):
            return None
        made = Output(
            self._ready,
            tuple(self._new),
            tuple(self._logprobs),
            tuple(self._prompt_logprobs),
            self.finish,
        )
        self._ready = ""
        for told in (self._new, self._logprobs, self._prompt_logprobs):
            told.clear()
        return made

    def fail(self, failure: Failure) -> Output:
        """The last output of a sequence that cannot go on."""
        return Output(failure=failure)

    def _end(self, reason: str, stopped_by: str | int | None) -> None:
        if self._text is not None and not isinstance(stopped_by, str):
            self._ready += self._stop.add(self._text.flush())
            if self._stop.found is None:
                self._ready += self._stop.flush()
            else:
                reason, stopped_by = "stop", self._stop.found
        self.finish = Finish(reason, stopped_by, self.made, self.cached)


def fits(request: Request, capacity: int, vocab: int) -> str:
    """Why a request cannot be run on slots of `capacity` tokens; empty if it can."""
    row: Row[int] = request.prompt
    if not row:
        return "the prompt is empty; give at least one token"
    if min(row) < 0 or max(row) >= vocab:
        wrong = next(token for token in row if not 0 <= token < vocab)
        return f"the prompt has token id {wrong}; expected 0 to {vocab - 1}"
    if request.max_tokens < 0 or request.total > capacity:
        return (
            f"{len(row)} tokens of prompt and {request.max_tokens} to generate; this server's "
            f"slots hold {capacity} tokens together"
        )
    return ""
