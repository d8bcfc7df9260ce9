"""Give a graph's initialisers their values, straight from the checkpoint's files.

Each value is read when it is written out, one tensor at a time, so nothing is held in memory.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from cla_export.errors import GraphError
from cla_export.models.checkpoint import Checkpoint
from cla_export.models.safetensors_index import TensorEntry

STORED = {  # safetensors name -> (numpy dtype, ONNX dtype)
    "F32": (np.dtype(np.float32), ir.DataType.FLOAT),
    "F16": (np.dtype(np.float16), ir.DataType.FLOAT16),
    "BF16": (np.dtype(ml_dtypes.bfloat16), ir.DataType.BFLOAT16),
}


def attach(model: ir.Model, checkpoint: Checkpoint, constants: Mapping[str, torch.Tensor]) -> None:
    """Point every initialiser without a value at the checkpoint or at a named constant.

    A tensor whose stored dtype differs from the graph's is converted as it is read.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif name in checkpoint.tensors:
            value.const_value = _lazy(checkpoint.tensors[name], value)
        else:
            raise GraphError(
                f"initialiser {name} is neither a weight of {checkpoint.folder} nor a constant of "
                "its family; the traced module and the checkpoint are not the same model"
            )


def _lazy(entry: TensorEntry, value: ir.Value) -> ir.LazyTensor:
    stored, _ = STORED[entry.dtype]
    wanted = value.dtype
    assert wanted is not None

    def read() -> ir.TensorProtocol:
        data = np.memmap(entry.path, stored, mode="r", offset=entry.offset, shape=entry.shape)
        return ir.tensor(data.astype(wanted.numpy(), copy=False), dtype=wanted, name=entry.name)

    return ir.LazyTensor(read, dtype=wanted, shape=ir.Shape(entry.shape), name=entry.name)
