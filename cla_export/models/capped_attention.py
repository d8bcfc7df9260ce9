"""Attention whose scores have a soft cap, which PyTorch has no operator for."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float,
) -> Tensor:
    """softmax(cap * tanh(scale * q . k / cap)) v, causal where no mask is given.

    A call can be watched and replaced as those of PyTorch's functions can (`TorchFunctionMode`).
    Traced, it is its parts, which rewrite/fuse_attention.py makes one Attention again.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hkv, T, D], Hq a multiple of Hkv.
        value: [B, Hkv, T, D].
        mask: bool, [B or 1, 1, S, T]: the keys that a query may see.
        scale: what a product of query and key is multiplied by.
        softcap: scores stay between this and its negative.

    Returns:
        [B, Hq, S, D].
    """
    given = (query, key, value)
    if has_torch_function(given):
        out: Tensor = handle_torch_function(
            capped_attention, given, *given, mask, scale=scale, softcap=softcap
        )
        return out
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ value
