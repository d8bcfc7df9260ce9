"""Where each tensor of a checkpoint lies: read from safetensors headers, no data touched.

Source: the safetensors format (8-byte little-endian header size, JSON header, raw data).
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cla_export.errors import BadInput

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
SINGLE = "model.safetensors"
_META = "consolidated.*.pth"
_PICKLED = ("pytorch_model*.bin", _META, "*.pt", "*.pth", "*.bin", "*.ckpt", "*.pkl")
_CONVERSION = (
    "import glob, torch; from safetensors.torch import save_file; "
    "files = [torch.load(f, 'cpu', weights_only=True) for f in sorted(glob.glob({}))]; "
    "save_file({{n: t.clone() for f in files for n, t in f.items()}}, {})"
)
_SHOWN = 8  # names


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in one safetensors file. `offset` counts bytes from the start of the file.

    One that is put together lies in `parts`, end to end; its own place is the first one's.
    """

    name: str
    path: Path
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    parts: tuple["TensorEntry", ...] = ()

    @property
    def places(self) -> tuple["TensorEntry", ...]:
        """Where its bytes lie, in order."""
        return self.parts or (self,)

    def rows(self, start: int, stop: int) -> "TensorEntry":
        """Rows of it, which lie in one place as well."""
        row = self.nbytes // self.shape[0]
        shape, offset = (stop - start, *self.shape[1:]), self.offset + start * row
        return TensorEntry(self.name, self.path, self.dtype, shape, offset, (stop - start) * row)


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Index a model folder's weights, one file or shards named by an index file."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        shards = _shards_of(index_file)
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise BadInput(f"{folder}: {_without_safetensors(folder)}")
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        entries |= read_header(folder / shard)
    return entries


def _without_safetensors(folder: Path) -> str:
    """What to do about a folder that has no weights, or pickled ones, which are never opened."""
    by_pattern = {p: sorted(path.name for path in folder.glob(p)) for p in _PICKLED}
    pattern, pickled = next(((p, names) for p, names in by_pattern.items() if names), ("", []))
    if not pickled:
        return (
            "no model.safetensors and no model.safetensors.index.json; the folder must hold the "
            "model's weights in safetensors format"
        )
    found = (
        f"its weights are pickled ({', '.join(pickled)}), which are not opened, since unpickling "
        "can run code"
    )
    if pattern == _META and len(pickled) > 1:
        return (
            f"{found}; each of these holds a part of every tensor, so they have to be joined by "
            "the code that wrote them. Such models are published in safetensors format too: take "
            "that one"
        )
    program = _CONVERSION.format(repr(str(folder / pattern)), repr(str(folder / SINGLE)))
    names = " (names in it are Meta's, so pass --module)" if pattern == _META else ""
    return (
        f"{found}. Convert them once, tensors alone{names}:\n  python -c {shlex.quote(program)}\n"
        "or, where transformers knows the model, open it there and write it with save_pretrained"
    )


def _shards_of(index_file: Path) -> list[str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        places = [PurePosixPath(shard) for shard in shards]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index_file}: not a safetensors index ({error!r})") from error
    for shard, place in zip(shards, places, strict=True):
        if place.is_absolute() or ".." in place.parts or "\\" in shard:
            raise BadInput(
                f"{index_file}: names {shard!r}, outside of the model folder; such files are not "
                "opened: a shard lies beside its index"
            )
    gone = [shard for shard in shards if not (index_file.parent / shard).is_file()]
    if gone:
        lost = sorted(name for name, shard in weight_map.items() if shard in gone)
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        verb, them = ("is", "it") if len(gone) == 1 else ("are", "them")
        raise BadInput(
            f"{index_file}: names {', '.join(gone)}, which {verb} not in the folder; {len(lost)} "
            f"of {len(weight_map)} tensors are lost with {them}: {', '.join(lost[:_SHOWN])}{more}. "
            f"Download {them} again"
        )
    return shards


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read one file's header and check that the file holds every byte it promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise BadInput(
                f"{path}: truncated or not a safetensors file (the header should take "
                f"{header_size} bytes, the file has {size}); download or save it again"
            )
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            raise BadInput(f"{path}: its safetensors header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise BadInput(
            f"{path}: its safetensors header is a {type(header).__name__}; expected a JSON object"
        )
    data_start = 8 + header_size
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entries[name] = found = _read_entry(path, name, entry, data_start)
        end = found.offset + found.nbytes
        if end > size:
            raise BadInput(
                f"{path}: truncated; tensor {name} ends at byte {end}, the file has {size}; "
                "download or save it again"
            )
    return entries


def _read_entry(path: Path, name: str, entry: object, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        dtype, shape, begin, end = "", None, 0, 0
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise BadInput(f"{path}: the header's entry of tensor {name} is malformed: {entry!r}")
    wanted = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if dtype in DTYPE_BYTES and end - begin != wanted:
        raise BadInput(
            f"{path}: tensor {name} takes {end - begin} bytes; {dtype} of shape {shape} needs "
            f"{wanted}: save it again"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, end - begin)
