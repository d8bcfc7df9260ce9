"""Watching a module's forward: each call of attention, and what its norms add."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of scaled_dot_product_attention. Tensors are [B, heads, S, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def q_heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key.shape[3]


class AttentionCalls(TorchFunctionMode):
    """Collects calls in order, and the numbers that norms may add to a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.epsilons: set[float] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.calls.append(Call(given["query"], given["key"], given["value"]))
        elif func in (F.rms_norm, torch.rms_norm):
            given = dict(zip(_RMS_NORM, args, strict=False)) | kwargs
            eps = given.get("eps")
            self.epsilons.add(torch.finfo(given["input"].dtype).eps if eps is None else float(eps))
        elif func in _SUMS:
            self.epsilons |= {number for number in args if isinstance(number, float)}
        return func(*args, **kwargs)
