"""Weights that a bundle reads from the checkpoint's own files, without a copy of their bytes.

A safetensors file is raw data behind a header, which is what an ONNX graph's external data may be
too: a file, an offset, a length. Where a bundle keeps a checkpoint's dtype, it takes the files in
and points into them. They come in as clones, where the file system shares blocks between files
(XFS, Btrfs), or else as hard links: no byte is written either way. What can be neither, or is
small, is copied into the bundle's own weights file.

ONNX Runtime and TensorRT open linked files. The readers of the onnx packages, and so its checker
and polygraphy, refuse a file that has several names, as a safeguard: they want a bundle whose
weights were copied.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cla_export.errors import BadInput, BundleError
from cla_export.models.checkpoint import Checkpoint
from cla_export.models.safetensors_index import TensorEntry

WEIGHTS = ("auto", "link", "copy")
SMALL_FILE = 1 << 30  # bytes; `auto` copies smaller ones, so that every tool opens the bundle
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CLONE = 0x40049409  # FICLONE of Linux: share the blocks of another file


def linkable(checkpoint: Checkpoint, dtype: str, weights: str) -> list[Path]:
    """The checkpoint's files that a bundle of `dtype` should point into.

    Those that it would read for the most part: not one that holds another dtype, or other models,
    or experts one by one, which a graph has in one tensor.
    """
    if weights not in WEIGHTS:
        raise BadInput(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    read: dict[Path, int] = {}
    for entry in checkpoint.tensors.values():
        same = entry.dtype == _SAFETENSORS[dtype] and not entry.parts
        read[entry.path] = read.get(entry.path, 0) + (entry.nbytes if same else 0)
    files = [] if weights == "copy" else [p for p, n in read.items() if 2 * n > p.stat().st_size]
    if weights == "link" and not files and any(e.parts for e in checkpoint.tensors.values()):
        raise BadInput(
            f"{checkpoint.folder}: most of its weights are stored in pieces that a bundle has in "
            "one tensor, such as experts, so they cannot be linked; let them be copied "
            "(--weights auto)"
        )
    if weights == "link" and not files:
        raise BadInput(
            f"{checkpoint.folder}: its weights are {checkpoint.dtype} for the most part and the "
            f"bundle's would be {dtype}, so they cannot be linked; export with the dtype that they "
            "have, or let them be converted (--weights auto)"
        )
    if weights == "auto" and sum(path.stat().st_size for path in files) < SMALL_FILE:
        return []
    return files


def take_in(files: Iterable[Path], folder: Path, *, required: bool) -> dict[Path, str]:
    """Clone or link files into a bundle's folder: each one's name there.

    Those that can be neither are left out; with `required`, they are an error.
    """
    names: dict[Path, str] = {}
    for path in files:
        dest = folder / path.name
        if not _clone(path, dest):
            try:
                os.link(path.resolve(), dest)
            except OSError as error:
                if required:
                    raise BadInput(
                        f"{path}: cannot be linked into {folder.parent} ({error.strerror}); "
                        "choose a destination on its file system, or copy its weights"
                    ) from error
                continue
        names[path] = path.name
    return names


def _clone(path: Path, dest: Path) -> bool:
    with path.open("rb") as source, dest.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
        except OSError:
            dest.unlink()
            return False
    return True


def pointer(entry: TensorEntry, file: str, folder: Path, dtype: ir.DataType) -> ir.ExternalTensor:
    """A tensor of a file that was taken in."""
    return ir.ExternalTensor(
        file,
        entry.offset,
        entry.nbytes,
        dtype,
        shape=ir.Shape(entry.shape),
        name=entry.name,
        base_dir=folder,
    )


def read_in_place(model: ir.Model, folder: Path) -> ir.Model:
    """Let a bundle's graph read its weights as they lie, linked files too. Returns the model."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _mapped(value.const_value, folder)
    return model


def _mapped(tensor: ir.ExternalTensor, folder: Path) -> ir.LazyTensor:
    """The same tensor, mapped when it is read."""
    if Path(tensor.location).name != tensor.location:
        raise BundleError(
            f"{folder}: weight {tensor.name} is kept in {tensor.location!r}; a bundle's weights "
            "are files of its own folder. Export again"
        )

    def read() -> ir.TensorProtocol:
        dtype, offset = tensor.dtype.numpy(), tensor.offset or 0
        shape = tensor.shape.numpy()
        data = np.memmap(folder / tensor.location, dtype, "r", offset=offset, shape=shape)
        return ir.tensor(data, dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
