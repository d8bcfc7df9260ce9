"""Mixtures of experts of transformers, in the form that a graph can have (see experts.py).

Its modules ask for a function by the name of their config's `experts_implementation`; ours is one
more. Its own `batched_mm` copies a token's experts for every token of a prompt, `grouped_mm` has
no ONNX operator, and `eager` loops over data.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cla_export.errors import BadInput
from cla_export.models.experts import weigh_all

IMPLEMENTATION = "cla_export"
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k")


def routed(model: Any, config: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401
    """Of the weights of a mixture's experts, how many of how many a token goes through."""
    chosen = next((getattr(config, n) for n in _CHOSEN if hasattr(config, n)), None)
    return {
        f"{path}.{name}": (chosen, len(weight))
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and isinstance(chosen, int)
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def experts(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Experts of transformers: by their own code, or in the form that a graph can have."""
    if not torch.compiler.is_exporting():
        own: Tensor = type(module).forward.__wrapped__(
            module, hidden_states, top_k_index, top_k_weights
        )
        return own
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.has_post_expert_norm:
        raise BadInput(
            f"config.json: experts of {type(module).__name__} have a norm of their own behind "
            "them, which cannot be exported"
        )
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else None
    return weigh_all(
        hidden_states,
        top_k_index,
        top_k_weights,
        up if module.is_transposed else up.mT,
        down if module.is_transposed else down.mT,
        module._apply_gate if module.has_gate else module.act_fn,  # noqa: SLF001
        biases,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts)
