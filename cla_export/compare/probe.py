"""PyTorch's side of every layer: what goes into attention, what comes out, what the layer returns.

Attention is caught where the module calls scaled_dot_product_attention, so nothing here depends on
how a family names its parts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from cla_export.models.cla import ClaDecoder

ROLES = ("q", "k", "v", "attention", "output")  # in the order they are computed within a layer
Tensors = dict[tuple[int, str], NDArray[np.float32]]  # (layer, role) -> [S, width]


class _AttentionProbe(TorchFunctionMode):
    """Records q, k, v and the output of each attention call, in execution order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensors = {}
        self._layer = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever PyTorch returns
        del types
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            for role, value in zip(ROLES, (*args[:3], result), strict=False):
                self.found[self._layer, role] = _tokens_first(value)
            self._layer += 1
        return result


@torch.inference_mode()
def torch_tensors(model: ClaDecoder, tokens: NDArray[np.int64]) -> Tensors:
    """All layers' tensors for one row of tokens [S], recomputed from the first."""
    outputs: Tensors = {}

    def catch(layer: int) -> Callable[..., None]:
        def hook(_module: object, _arguments: object, output: Tensor) -> None:
            outputs[layer, "output"] = output[0].float().numpy().copy()

        return hook

    handles = [
        layer.register_forward_hook(catch(index)) for index, layer in enumerate(model.model.layers)
    ]
    try:
        with _AttentionProbe() as probe:
            model(torch.from_numpy(tokens)[None], torch.arange(len(tokens))[None])
    finally:
        for handle in handles:
            handle.remove()
    return {**probe.found, **outputs}


def _tokens_first(value: Tensor) -> NDArray[np.float32]:
    """[1, H, S, D] as [S, H * D]."""
    array: NDArray[np.float32] = value[0].transpose(0, 1).flatten(1).float().numpy().copy()
    return array
