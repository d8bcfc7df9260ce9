"""Text for the gate: the bundle's held-out text through its tokenizer, or seeded random ids."""

from pathlib import Path

import numpy as np

from cla_export.bundle import Bundle
from cla_export.errors import BadInput
from cla_export.tokenizer import load_tokenizer

SEED = 20240521


def token_stream(bundle: Bundle, text: Path | None, seed: int = SEED) -> tuple[list[int], str]:
    """Token ids to compare on, and a word about where they come from.

    `text` None takes the bundle's own heldout.txt where there is one and a tokenizer to read it;
    `seed` is that of the random ids otherwise.
    """
    path = text or bundle.folder / "heldout.txt"
    tokenizer = load_tokenizer(bundle.folder)
    if path.is_file() and tokenizer is not None:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids
        if ids:
            return ids, path.name
    if text is not None:
        raise BadInput(
            f"{text}: "
            + ("no such file" if not text.is_file() else "the bundle has no tokenizer.json")
        )
    generator = np.random.default_rng(seed)
    return generator.integers(0, bundle.vocab_size, 4096).tolist(), f"random ids, seed {seed}"
