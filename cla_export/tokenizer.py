"""The model's own tokenizer, from a folder's tokenizer.json, and the text that comes with it."""

from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED = 20240521
_RANDOM_IDS = 4096


def load_tokenizer(folder: Path) -> "Tokenizer | None":
    """Load tokenizer.json; None where the folder has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path}: the tokenizers library cannot read it ({error})") from error


def token_stream(
    folder: Path, vocab_size: int, text: Path | None, seed: int = SEED
) -> tuple[list[int], str]:
    """Token ids of a text for a model folder or bundle, and a word about where they come from.

    `text` None takes the folder's own heldout.txt where there is one and a tokenizer to read it,
    else random ids of that seed. BadInput if a text is named that cannot be read.
    """
    import numpy as np

    path = text or folder / "heldout.txt"
    tokenizer = load_tokenizer(folder)
    if path.is_file() and tokenizer is not None:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids
        if ids:
            return ids, path.name
    if text is not None:
        why = "it holds no text" if path.is_file() else "no such file"
        if tokenizer is None and path.is_file():
            why = f"{folder} has no tokenizer.json to read it with; add one, or name no text"
        raise BadInput(f"{text}: {why}")
    generator = np.random.default_rng(seed)
    return generator.integers(0, vocab_size, _RANDOM_IDS).tolist(), f"random ids, seed {seed}"
