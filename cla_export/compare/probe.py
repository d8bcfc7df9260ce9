"""PyTorch's side of every layer, one step at a time, each from what the bundle had before it.

Recomputed from the bundle's own values, a step shows its own error alone: rounding that earlier
layers accumulated cannot hide it, and a step that is right stays right behind one that is wrong.

    q, k, v             from the layer's input
    key and value cache from k and v (no arithmetic: they must be the same)
    attention           from q and the caches; int8 ones as the bundle has them
    attention_branch    from attention: the output projection
    mlp                 from the input and the attention branch
    output              from those two and mlp

Attention is caught where the module calls scaled_dot_product_attention, or ours with a soft cap,
so q, k, v and its output do not depend on how a family names its parts; how much it feels errors in
its scores is measured there too, since runtimes differ in where they round those. The branches are
caught at the modules that nearly all families call `self_attn` and `mlp`; where there are none,
those steps run on into the next.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from cla_export.compare.reference import Exact, GroupKV, Side
from cla_export.compare.rounded_activations import hooked
from cla_export.compare.routing import ROUTER, Routes
from cla_export.models.capped_attention import capped_attention

CACHES = {"k": "key_cache", "v": "value_cache"}  # what goes in, and what is there afterwards
Key = tuple[int, str]  # layer and role
Array = NDArray[np.floating]
Tensors = dict[Key, Exact]  # [S, width]
Sensitivity = dict[int, float]  # layer -> see `_sensitivity`
_BRANCHES = {"self_attn": "attention_branch", "mlp": "mlp"}


class _Steps(TorchFunctionMode):
    """Records each step, and goes on from what the bundle made of it."""

    def __init__(
        self, owners: Sequence[int], forced: Mapping[Key, Array], count: int, *, feel: bool
    ) -> None:
        super().__init__()
        self._feel = feel
        self.found: Tensors = {}
        self.sensitivity: Sensitivity = {}
        self._owners, self._forced = owners, forced
        self._count = count  # of the row's tokens: K and V may begin with held ones
        self._layer = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever PyTorch returns
        del types
        if func not in (F.scaled_dot_product_attention, capped_attention):
            return func(*args, **(kwargs or {}))
        layer, self._layer = self._layer, self._layer + 1
        owner = self._owners[layer]
        q, k, v = (
            self._step((layer if role == "q" else owner, role), value)
            for role, value in zip(("q", "k", "v"), args[:3], strict=True)
        )
        y = func(q, k, v, *args[3:], **(kwargs or {}))
        if self._feel:
            self.sensitivity[layer] = _sensitivity(q, k, v, y, *args[3:], **(kwargs or {}))
        return self._step((layer, "attention"), y)

    def _step(self, key: Key, value: Tensor) -> Tensor:
        """Record [1, H, T, D] of the row's tokens; return it with the bundle's in their place."""
        new = value[:, :, -self._count :]
        self.found.setdefault(key, _tokens_first(new))
        layer, role = key
        stored = (layer, CACHES.get(role, role))  # there where caches round what they hold
        key = stored if stored in self._forced else key
        if key not in self._forced:
            return value
        heads = torch.from_numpy(self._forced[key]).to(value.dtype)  # [S, H * D]
        mine = heads.unflatten(-1, (value.shape[1], -1)).transpose(0, 1)[None]  # type: ignore[no-untyped-call]
        return torch.cat((value[:, :, : -self._count], mine), 2)

    def of_module(self, key: Key) -> Callable[[object, object, Any], Any]:
        """A forward hook that does the same with a module's output [1, S, width].

        It may be the first of several; one of another shape is no step of ours.
        """

        def hook(_module: object, _inputs: object, output: Any) -> Any:  # noqa: ANN401
            first = output[0] if isinstance(output, tuple) else output
            if first.ndim != 3:
                return output
            self.found[key] = first[0].double().numpy().copy()
            if key not in self._forced:
                return output
            mine = torch.from_numpy(self._forced[key]).to(first.dtype)[None]
            return (mine, *output[1:]) if isinstance(output, tuple) else mine

        return hook


def torch_tensors(
    side: Side,
    tokens: NDArray[np.int64],
    forced: Mapping[Key, Array],
    held: GroupKV | None = None,
    *,
    routes: Routes | None = None,
    feel: bool = False,
) -> tuple[Tensors, Sensitivity]:
    """Every step of every layer for one row of tokens [S], each from what is in `forced`.

    `forced` holds what the bundle made, (layer, role) -> [S, width]; a step of which it lacks the
    input goes on from PyTorch's own. With `feel`, also each attention's sensitivity to its scores.
    With `routes`, routers choose these; what they have scored [S, experts] is there by their role.
    """
    layout = side.model.spec.layout
    steps = _Steps(layout.kv_owner, forced, len(tokens), feel=feel)
    handles = []
    for index, layer in enumerate(side.model.blocks()):
        handles.append(layer.register_forward_hook(steps.of_module((index, "output"))))
        for name, role in _BRANCHES.items():
            if isinstance(part := getattr(layer, name, None), nn.Module):
                handles.append(part.register_forward_hook(steps.of_module((index, role))))
    following = side.follow(routes) if routes else nullcontext()
    with hooked(handles), following as followed, steps:
        side.forward(tokens, held)
    if followed is not None:
        steps.found |= {(layer, ROUTER): found for layer, found in followed.scores.items()}
    return steps.found, steps.sensitivity


def _sensitivity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # the arguments of attention itself
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> float:
    """How far an element of attention moves, at most, where each score is off by its own size.

    For weights p, scores s and values v, to first order: sum of p |s| (|v| + |y|).
    """
    del dropout_p, enable_gqa
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    repeat = heads // k.shape[1]
    causal = is_causal or (softcap is not None and attn_mask is None)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else attn_mask
    if allowed is not None:
        allowed = allowed.expand(1, heads, queries, keys)
    largest = 0.0
    for head in range(heads):  # one at a time: scores of long prompts are large
        mine, key, value = q[:, head], k[:, head // repeat], v[:, head // repeat]
        scores = mine @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        masked = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if allowed is not None and allowed.dtype == torch.bool:
            masked = masked.masked_fill(~allowed[:, head], -torch.inf)
        elif allowed is not None:
            masked = masked + allowed[:, head]
        weights = masked.softmax(-1) * scores.abs()
        moved = weights @ value.abs() + weights.sum(-1, keepdim=True) * y[:, head].abs()
        largest = max(largest, float(moved.max()))
    return largest


def _tokens_first(value: Tensor) -> Exact:
    """[1, H, S, D] as [S, H * D]."""
    array: Exact = value[0].transpose(0, 1).flatten(1).double().numpy().copy()
    return array
