"""PyTorch module -> stateless ONNX graph, without the weights in memory.

The module is built and traced under fake tensors, so tracing costs the same whatever the weights
weigh. The result is an `onnx_ir.Model` at opset 23, where the exporter keeps Attention and
RMSNormalization whole (at 24 and later it decomposes the latter):

    input_ids [B, S] int64, position_ids [B, S] int64  ->  logits [B, S, V]

Its initialisers carry the module's own names and have no values yet (see weights.py).
"""

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cla_export.errors import GraphError
from cla_export.models import Family
from cla_export.spec import ModelSpec

TRACE_OPSET = 23
INPUTS = ("input_ids", "position_ids")


def trace(family: Family, spec: ModelSpec, dtype: torch.dtype) -> ir.Model:
    """Trace a family's module with parameters of `dtype` (float32, float16 or bfloat16)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = family.build(spec).eval()
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        model = trace_module(module)
    _name_parameters(model, module, set(spec.weights()))
    _keep_masks(model, module)
    return model


def _keep_masks(model: ir.Model, module: nn.Module) -> None:
    """Give square buffers their values: what a mask that a module keeps means is in them."""
    for name, buffer in module.named_buffers():
        square = buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2]
        if square and name in model.graph.initializers and not isinstance(buffer, FakeTensor):
            model.graph.initializers[name].const_value = ir.tensor(buffer.numpy(), name=name)


def trace_module(module: nn.Module) -> ir.Model:
    """Trace any module with forward `(input_ids, position_ids) -> logits`, both axes dynamic.

    The initialisers of the returned graph have no values: those of a fake module are not to be
    had, and constant folding must not wait for those of a real one.

    Raises:
        GraphError: torch.export cannot trace it.
    """
    batch, length = 2, 5  # any sizes other than 1, which would be taken for constants
    input_ids = torch.zeros(batch, length, dtype=torch.int64)
    position_ids = torch.arange(length).repeat(batch, 1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(
                module, (input_ids, position_ids), dynamic_shapes=(dynamic, dynamic)
            )
        except Exception as error:  # of many types, none of them public
            reason = str(error).strip().partition("\n\n")[0]
            raise GraphError(
                f"torch.export cannot trace the model's forward for any batch and length; what it "
                f"does may depend on shapes, and not on values ({type(error).__name__}: {reason})"
            ) from error
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=TRACE_OPSET,
            input_names=list(INPUTS),
            output_names=["logits"],
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returns a program")
    model = program.model
    for initializer in model.graph.initializers.values():
        initializer.const_value = None
    return model


def _name_parameters(model: ir.Model, module: nn.Module, names: set[str]) -> None:
    """Give a parameter that the module holds under several names the one its checkpoint uses."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for same in aliases.values():
        stored = next((name for name in same if name in names), same[0])
        for name in same:
            if name != stored and name in model.graph.initializers:
                value = model.graph.initializers[name]
                if stored in model.graph.initializers:
                    value.replace_all_uses_with(model.graph.initializers[stored])
                    del model.graph.initializers[name]
                else:
                    value.name = stored


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about packages nobody asked for off the terminal.

    Garbage collection waits as well: tracing makes millions of small objects that live to its end,
    and looking through them again and again takes a quarter of the time.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    collecting = gc.isenabled()
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            if collecting:
                gc.enable()
