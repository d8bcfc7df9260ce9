"""What the rest asks of a decoder in PyTorch: stateless logits, and runs over somebody's caches.

A module that was written for this package takes a `KVCache` as an argument. Any other one is
wrapped: its calls of `scaled_dot_product_attention` are numbered in the order they come, and in a
run over caches the n-th of them attends to what the KV layout says that layer n reads. That is what
tracing relies on too, where each of these calls becomes one Attention node.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from cla_export.errors import GraphError
from cla_export.layout import KVLayout
from cla_export.models.capped_attention import capped_attention
from cla_export.spec import ModelSpec

KV = tuple[Tensor, Tensor]  # keys and values of one group, [B, Hkv, T, D] each


class KVCache(Protocol):
    """Where a stateful run keeps what owners produce."""

    def update(self, group: int, key: Tensor, value: Tensor) -> KV:
        """Store the new K and V [B, Hkv, S, D] of a group; return all of it [B, Hkv, T, D]."""

    def mask(self, position_ids: Tensor, window: int | None) -> Tensor:
        """Which of the T keys each query may see: bool [B, 1, S, T]."""


class Decoder(nn.Module):
    """A decoder-only language model with any KV layout."""

    spec: ModelSpec

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [B, S, V] of input_ids, position_ids [B, S].

        Without a cache nothing came before the row, which is what gets traced.
        """
        raise NotImplementedError

    def forward_with_kv(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[KV]]:
        """Stateless logits [B, S, V] and each group's K and V [B, Hkv, S, D].

        No K and V where the spec says that attention is spelt out.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The modules of its layers, in order; none where no list of modules has so many."""
        count = self.spec.num_layers
        lists = (m for m in self.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return list(next(lists, nn.ModuleList()))


class StatelessDecoder(Decoder):
    """Any module with forward `(input_ids, position_ids) -> logits`, as a Decoder.

    Its parts carry the names that they have in the module, and so in its checkpoint.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.__dict__["module"] = module  # no child of this one: its parts are
        for parts in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[parts] = module.__dict__[parts]  # what replaces one here does so there

    def stateless(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Call the module."""
        logits: Tensor = self.__dict__["module"](input_ids, position_ids)
        return logits

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        if cache is None:
            return self.stateless(input_ids, position_ids)
        return self._run(input_ids, position_ids, cache)[0]

    def forward_with_kv(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[KV]]:
        return self._run(input_ids, position_ids, None)

    def _run(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, list[KV]]:
        with _OverCaches(self.spec.layout, position_ids, cache) as calls:
            logits = self.stateless(input_ids, position_ids)
        if calls.layer != self.spec.num_layers:
            raise GraphError(
                f"the model calls scaled_dot_product_attention {calls.layer} times; its KV layout "
                f"has {self.spec.num_layers} layers"
            )
        return logits, calls.groups


class InFloat64(TorchFunctionMode):
    """Leaves out casts from float64 to float32: modules write them for 16-bit weights."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if (
            kwargs.get("dtype") == torch.float32
            and getattr(args[0] if args else None, "dtype", None) == torch.float64
        ):
            kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        result = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.float) and args[0].dtype == torch.float64:
            return args[0] if result.dtype == torch.float32 else result
        return result


class _OverCaches(InFloat64):
    """Gives each attention the keys and values of its group, from a cache if there is one."""

    def __init__(self, layout: KVLayout, positions: Tensor, cache: KVCache | None) -> None:
        super().__init__()
        self.layer = 0
        self.groups: list[KV] = []
        self._layout, self._positions, self._cache = layout, positions, cache

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func in (F.scaled_dot_product_attention, capped_attention):
            return self._attend(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002 (none is dropped in evaluation)
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002 (said by the heads)
        softcap: float | None = None,
    ) -> Tensor:
        layer, layout = self.layer, self._layout
        self.layer += 1
        if layer >= layout.num_layers:
            return query
        group = layout.group_of(layer)
        if layout.is_owner(layer):
            repeats = key.shape[1] // layout.kv_heads[layer]  # of each head, as some models do
            new = key[:, ::repeats], value[:, ::repeats]
            self.groups.append(new if self._cache is None else self._cache.update(group, *new))
        if self._cache is not None:
            attn_mask = self._cache.mask(self._positions, layout.window[layer])
            is_causal = False
        if softcap is not None:
            assert scale is not None
            return capped_attention(
                query, *self.groups[group], attn_mask, scale=scale, softcap=softcap
            )
        return F.scaled_dot_product_attention(
            query,
            *self.groups[group],
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=layout.kv_heads[layer] < query.shape[1],
        )
