"""PyTorch, eager and compiled, as one would write it by hand."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from random_model import Floats, Prompts, made_up
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cla_export.bundle import Bundle
from cla_export.models.checkpoint import load_model, open_checkpoint
from cla_export.models.cla import ClaDecoder, Layer, rotate
from peers.peer import Peer


class TorchPeer(Peer):
    """PyTorch over preallocated caches per group, query heads folded onto their kv head.

    Eagerly, a step reads the valid part of the caches. Compiled, its shapes stand still: it reads
    all of them, which in a cell is a few tokens more, behind a mask.
    """

    def __init__(
        self, bundle: Bundle, threads: int, *, compiled: bool = False, frozen: bool = False
    ) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(open_checkpoint(bundle.source))
        self._model.requires_grad_(requires_grad=False)
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._compiled, self._compiled_for = compiled, (0, 0)
        self._run: Callable[..., Tensor] = torch_step
        if frozen:
            from torch._inductor import config

            config.freezing = True  # the tracer reads it too, so it is no option of `compile`

    def start(self, batch: int, capacity: int) -> None:
        self.free()
        for group in self._model.spec.layout.groups:
            shape = (batch, group.kv_heads, capacity, group.head_dim)
            self._caches.append((torch.zeros(shape), torch.zeros(shape)))
        if self._compiled and self._compiled_for != (batch, capacity):
            self._compiled_for = batch, capacity
            torch.compiler.reset()
            self._run = torch.compile(torch_step, dynamic=False, fullgraph=True)

    def fill(self, context: int) -> None:
        batch = self._caches[0][0].shape[0]
        for group, slot, *made in made_up(self._model.spec.layout, batch, context):
            for cache, new in zip(self._caches[group], made, strict=True):
                cache[slot, :, :context] = torch.from_numpy(new)

    def prefill(self, rows: Prompts) -> Floats:
        with torch.inference_mode():
            ids = torch.from_numpy(rows)
            positions = torch.arange(rows.shape[1]).expand_as(ids)
            hidden, shared = self._model.model(ids, positions, None)
            for caches, parts in zip(self._caches, shared, strict=True):
                for cache, new in zip(caches, parts, strict=True):
                    cache[:, :, : rows.shape[1]] = new
            logits: Floats = self._model.lm_head(hidden[:, -1]).numpy()
        return logits

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        end = None if self._compiled else length + 1
        with torch.inference_mode():
            ids, position = torch.tensor(tokens), torch.tensor([length])
            logits: Floats = self._run(self._model, self._caches, ids, position, end).numpy()
        return logits

    def free(self) -> None:
        self._caches = []


def torch_step(
    model: ClaDecoder,
    caches: Sequence[tuple[Tensor, Tensor]],
    ids: Tensor,
    position: Tensor,
    end: int | None,
) -> Tensor:
    """Logits [B, V] of ids [B], all at one position [1].

    `end` is the position after it, where it may be a number; None masks the caches' rest instead.
    """
    body = model.model
    x = body.embed_tokens(ids)  # [B, H]
    rope = body.rope_cos[position], body.rope_sin[position]  # [1, D/2]
    for layer in cast("Iterable[Layer]", body.layers):
        attention, (keys, values) = layer.self_attn, caches[layer.group]
        normed = layer.input_layernorm(x)
        if attention.is_owner:
            source = layer.kv_layernorm(x) if hasattr(layer, "kv_layernorm") else normed
            key, value = attention.project_kv(source[:, None], rope)  # [B, Hkv, 1, D]
            keys.index_copy_(2, position, key)
            values.index_copy_(2, position, value)
        query = attention.q_proj(normed).view(len(ids), attention.kv_heads, -1, attention.head_dim)
        if attention.q_norm is not None:
            query = attention.q_norm(query)
        seen = visible(keys, values, position, end, layer.window)
        y = F.scaled_dot_product_attention(rotate(query, *rope), *seen)  # [B, Hkv, Hq/Hkv, D]
        x = x + attention.o_proj(y.reshape(len(ids), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(body.norm(x))
    return logits


def visible(
    keys: Tensor, values: Tensor, position: Tensor, end: int | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values, and a mask where they are more than a query at `position` sees."""
    if end is not None:
        seen = slice(0 if window is None else max(0, end - window), end)
        return keys[:, :, seen], values[:, :, seen], None
    places = torch.arange(keys.shape[2])
    mask = places <= position
    if window is not None:
        mask &= places > position - window
    return keys, values, mask[None, None, None]
