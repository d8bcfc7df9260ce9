"""Give a graph's initialisers their values, straight from the checkpoint's files.

A value that a file of the bundle holds already is pointed at; any other is read when it is written
out, one tensor at a time, so nothing is held in memory.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from cla_export.errors import GraphError
from cla_export.interleaving import INTERLEAVED, interleave
from cla_export.linked_weights import pointer
from cla_export.models.checkpoint import Checkpoint
from cla_export.models.safetensors_index import TensorEntry
from cla_export.quantization import PACKED, WEIGHT, Quantization

SMALL = 1024  # bytes; smaller tensors stay inside the graph
STORED = {  # safetensors name -> (numpy dtype, ONNX dtype)
    "F32": (np.dtype(np.float32), ir.DataType.FLOAT),
    "F16": (np.dtype(np.float16), ir.DataType.FLOAT16),
    "BF16": (np.dtype(ml_dtypes.bfloat16), ir.DataType.BFLOAT16),
}


def attach(
    model: ir.Model,
    checkpoint: Checkpoint,
    constants: Mapping[str, torch.Tensor],
    quantization: Quantization | None = None,
    taken_in: Mapping[Path, str] | None = None,
    folder: Path = Path(),
) -> None:
    """Point every initialiser without a value at the checkpoint or at a named constant.

    A tensor whose stored dtype differs from the graph's is converted as it is read, and so is one
    that is to be quantised. `taken_in` names the checkpoint's files that `folder` has as well.
    """

    @lru_cache(maxsize=1)  # packed and scales follow each other
    def packed(weight: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        assert quantization is not None
        whole = _read(checkpoint.tensors[weight])
        if whole.ndim == 3:  # of experts
            whole = interleave(whole) if target.endswith(INTERLEAVED) else whole
            return quantization.pack_experts(whole)
        return quantization.of_weight(target).pack(whole.astype(np.float32))

    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        if (weight := value.metadata_props.get(WEIGHT)) is not None:
            value.const_value = _lazy_part(packed, weight, value)
            continue
        if (weight := value.metadata_props.get(INTERLEAVED)) is not None:
            value.const_value = _lazy(checkpoint.tensors[weight], value, interleave)
            continue
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif name in checkpoint.tensors:
            value.const_value = _stored(checkpoint.tensors[name], value, taken_in or {}, folder)
        else:
            raise GraphError(
                f"initialiser {name} is neither a weight of {checkpoint.folder} nor a constant of "
                "its family; the traced module and the checkpoint are not the same model, or the "
                "module keeps a tensor as a plain attribute: register_buffer(name, tensor, "
                "persistent=False) makes it a constant"
            )


def _read(entry: TensorEntry) -> np.ndarray:
    stored, _ = STORED[entry.dtype]
    pieces = [
        np.memmap(place.path, stored, mode="r", offset=place.offset, shape=place.shape)
        for place in entry.places
    ]
    if not entry.parts:
        return pieces[0]
    return np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(entry.shape)


def _stored(
    entry: TensorEntry, value: ir.Value, taken_in: Mapping[Path, str], folder: Path
) -> ir.TensorProtocol:
    """Where it lies, if that is in one place and as it is wanted."""
    _, dtype = STORED[entry.dtype]
    in_one = entry.path in taken_in and not entry.parts
    if in_one and dtype == value.dtype and entry.nbytes > SMALL:
        return pointer(entry, taken_in[entry.path], folder, dtype)
    return _lazy(entry, value)


def _lazy(
    entry: TensorEntry,
    value: ir.Value,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> ir.LazyTensor:
    wanted = value.dtype
    assert wanted is not None

    def read() -> ir.TensorProtocol:
        data = _read(entry).astype(wanted.numpy(), copy=False)
        data = data if change is None else change(data)
        return ir.tensor(data, dtype=wanted, name=entry.name)

    return ir.LazyTensor(read, dtype=wanted, shape=ir.Shape(entry.shape), name=entry.name)


def _lazy_part(
    packed: Callable[[str, str], tuple[np.ndarray, np.ndarray]], weight: str, value: ir.Value
) -> ir.LazyTensor:
    """One of the two tensors that a quantised weight is."""
    name, dtype, shape = str(value.name), value.dtype, value.shape
    assert dtype is not None and isinstance(shape, ir.Shape)

    def read() -> ir.TensorProtocol:
        target, _, part = name.rpartition(".")
        data = packed(weight, target)[f".{part}" != PACKED]
        return ir.tensor(data.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
