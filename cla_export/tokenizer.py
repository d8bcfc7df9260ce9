"""The model's own tokenizer, from a folder's tokenizer.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
