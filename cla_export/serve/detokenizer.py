"""Tokens to text as they come, in pieces that are whole characters."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Decode = Callable[[Sequence[int]], str]

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are no character (yet)
_CONTEXT = 5  # tokens of the prompt: some decoders drop the space in front of what comes first
_PATIENCE = 32  # tokens that may end within a character before its bytes are taken for wrong
_REMEMBERED = 2**16  # texts of single tokens, about 100 bytes each


class Detokenizer:
    """The text of tokens that are added one by one.

    A token may hold part of a character, so text is held back while it ends in a broken one. It is
    decoded behind the tokens of the piece before, never alone: a decoder may look at what is there.
    Pieces and the flush together are the text of all tokens, but for a broken character at the end
    (and U+FFFD itself there: no decoder tells them apart).
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._before = list(prompt[-_CONTEXT:])
        self._before_text = decode(self._before) if self._before else ""
        if BROKEN in self._before_text:  # begins or ends within a character
            self._before, self._before_text = [], ""
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The characters that a token completes; empty while there are none."""
        self._held.append(token)
        text = self._text()
        if text.endswith(BROKEN) and len(self._held) < _PATIENCE:
            return ""
        if text:
            self._before, self._held = self._held, []
            self._before_text = self._decode(self._before)
        return text

    def flush(self) -> str:
        """What is held back, without a broken character at its end."""
        text = self._text().rstrip(BROKEN)
        self._held = []
        return text

    def _text(self) -> str:
        return self._decode(self._before + self._held)[len(self._before_text) :]


def decoder(tokenizer: "Tokenizer", *, skip_special_tokens: bool) -> Decode:
    """A tokenizer's way from tokens to text.

    Texts of single tokens are remembered: `Detokenizer.add` asks for one each time.
    """

    @lru_cache(_REMEMBERED)
    def decode_one(token: int) -> str:
        text: str = tokenizer.decode([token], skip_special_tokens=skip_special_tokens)
        return text

    def decode(tokens: Sequence[int]) -> str:
        if len(tokens) == 1:
            return decode_one(tokens[0])
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    return decode
