"""What a bundle with quantised weights rounds before it multiplies, done to PyTorch's side.

To int8, a scale for each block of channels: in every linear layer by hooks, and in experts, whose
products are calls of `linear` with a part of their weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cla_export.models.decoder import Decoder
from cla_export.quantization import Quantization


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded_activations(model: Decoder, quantization: Quantization) -> Iterator[None]:
    """Round what goes into every quantised product to int8, a scale for each block of channels."""

    def round_inputs(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        return _rounded(x, quantization.block)

    handles = [
        module.register_forward_pre_hook(round_inputs)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with hooked(handles):
        yield


class RoundedExperts(TorchFunctionMode):
    """Rounds what goes into every product with an expert's weight, in the same way."""

    def __init__(self, model: Decoder, quantization: Quantization) -> None:
        super().__init__()
        self._block = quantization.block
        parameters = dict(model.named_parameters())
        routed = (parameters[name] for name in model.spec.routed or {})
        self._places = {weight.untyped_storage().data_ptr() for weight in routed}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        del types
        if func is nn.functional.linear:
            x, weight = args[:2]
            if weight.untyped_storage().data_ptr() in self._places:
                args = (_rounded(x, self._block), *args[1:])
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor, block: int) -> Tensor:
    """Values rounded to int8, with a scale for each block of the last axis."""
    width = x.shape[-1]
    padded = nn.functional.pad(x, (0, -width % block)).reshape(*x.shape[:-1], -1, block)
    step = padded.abs().amax(-1, keepdim=True) / 127
    rounded: Tensor = (padded / step.clamp(min=torch.finfo(x.dtype).tiny)).round() * step
    return rounded.flatten(-2)[..., :width]
