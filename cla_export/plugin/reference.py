"""What ClaAttention computes, twice and slowly: in numpy (float64) and in torch (float32).

Written from the contract's semantics, apart from each other and from the kernel.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def numpy_reference(
    q: npt.NDArray[Any],
    key_cache: npt.NDArray[Any],
    value_cache: npt.NDArray[Any],
    kv_lengths: npt.NDArray[np.int32],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> npt.NDArray[np.float64]:
    """Output [B, Hq, S, D] in float64, one query at a time."""
    batch, query_heads, queries, _ = q.shape
    group = query_heads // key_cache.shape[1]
    y = np.zeros(q.shape, np.float64)
    for row in range(batch):
        for i in range(queries):
            position = int(kv_lengths[row]) - queries + i
            first = max(0, position - window + 1) if window else 0
            if position < 0:
                continue
            for head in range(query_heads):
                keys = key_cache[row, head // group, first : position + 1].astype(np.float64)
                values = value_cache[row, head // group, first : position + 1].astype(np.float64)
                scores = keys @ q[row, head, i].astype(np.float64) * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                y[row, head, i] = weights @ values / weights.sum()
    return y


def torch_reference(
    q: "torch.Tensor",
    key_cache: "torch.Tensor",
    value_cache: "torch.Tensor",
    kv_lengths: "torch.Tensor",
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> "torch.Tensor":
    """Output [B, Hq, S, D] in float32 on the inputs' device, one row of the batch at a time."""
    import torch

    _, query_heads, queries, _ = q.shape
    group = query_heads // key_cache.shape[1]
    y = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for row, length in enumerate(kv_lengths.tolist()):
        padding = max(queries - length, 0)  # queries before the row's first position
        if padding == queries:
            continue
        seen = slice(max(0, length - queries - window + 1) if window else 0, length)
        keys = key_cache[row, :, seen].float().repeat_interleave(group, 0)  # [Hq, L, D]
        values = value_cache[row, :, seen].float().repeat_interleave(group, 0)
        scores = q[row, :, padding:].float() @ keys.transpose(1, 2) * scale  # [Hq, S, L]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - queries + padding, length, device=q.device)[:, None]
        key = torch.arange(seen.start, length, device=q.device)
        hidden = key > position
        if window:
            hidden |= key <= position - window
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        y[row, :, padding:] = weights @ values
    return y
