"""What is served: a bundle's names, texts and limits, apart from the executor that runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cla_export.errors import BadInput
from cla_export.serve.chat import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model. `capacity` is tokens of prompt and answer together."""

    name: str
    created: int  # seconds since 1970
    capacity: int
    vocab_size: int
    tokenizer: "Tokenizer | None"
    template: ChatTemplate | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; the model must have a tokenizer. BadInput for text that is not Unicode."""
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"half of a surrogate pair at character {error.start}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text
