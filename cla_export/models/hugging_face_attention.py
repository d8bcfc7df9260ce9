"""Attention of transformers' models whose scores have a soft cap (Gemma 2).

Others run over PyTorch's scaled_dot_product_attention, which has no soft cap.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from cla_export.models.capped_attention import capped_attention

_CAPPED = "cla_export_capped"  # the name that transformers knows it by


def implementation(config: Any) -> str:  # noqa: ANN401
    """What computes attention in a model of this config, by transformers' name for it."""
    return "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else _CAPPED


def _attend(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,  # noqa: ANN401, ARG001 (dropout; the window, which is in the mask)
) -> tuple[Tensor, None]:
    """One layer's attention, [B, heads, S, D] -> [B, S, heads, D]; the mask is boolean."""
    assert softcap is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = capped_attention(query, key, value, attention_mask, scale=scale, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CAPPED, _attend)
AttentionMaskInterface.register(_CAPPED, sdpa_mask)
