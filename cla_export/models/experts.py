"""A mixture of experts, in a form that runs and in one that a graph can have.

Which experts a token goes to is data, and a graph's operators are fixed. So what is traced computes
every expert for every token and weighs the results, where the weight of an expert that the router
did not choose is zero. That is exact, has both axes dynamic, and costs experts / chosen times the
products; its largest values are [E, T, 2 * I] and [E, T, H] for T tokens in one call, which bounds
how long a prefill chunk may be. `lower/fuse_experts.py` puts an operator in its place that computes
the chosen ones alone, where a runtime has one. Outside a trace only those are computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Gate = Callable[[Tensor], Tensor]  # [..., 2 * I] -> [..., I]


def swiglu(both: Tensor) -> Tensor:
    """Silu of the first half, times the second."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """E experts of width I.

    `gate_up_proj` is [E, 2 * I, H], gates first, `down_proj` [E, H, I].
    """

    def __init__(self, count: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens x [T, H] through the experts `chosen` [T, k] for each, weighed by `weights`."""
        if torch.compiler.is_exporting():
            return weigh_all(x, chosen, weights, self.gate_up_proj.mT, self.down_proj.mT, swiglu)
        y = torch.zeros_like(x)
        for expert in set(chosen.flatten().tolist()):
            tokens, place = torch.where(chosen == expert)
            inner = swiglu(F.linear(x[tokens], self.gate_up_proj[expert]))
            made = F.linear(inner, self.down_proj[expert]) * weights[tokens, place, None]
            y.index_add_(0, tokens, made.to(y.dtype))
        return y


def weigh_all(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Gate,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Every expert of x [T, H], weighed: [T, H].

    Args:
        x: tokens, [T, H].
        chosen: which experts each token goes to, int64 [T, k].
        weights: of those, [T, k].
        up: [E, H, 2 * I], or [E, H, I] where `gate` takes that.
        down: [E, I, H].
        gate: what stands between them.
        biases: of the two products, [E, 2 * I] and [E, H].
    """
    inner = x @ up  # [E, T, 2I]
    inner = gate(inner if biases is None else inner + biases[0][:, None])
    made = inner @ down  # [E, T, H]
    made = made if biases is None else made + biases[1][:, None]
    experts = torch.arange(up.shape[0], device=x.device)
    share = torch.where(chosen[..., None] == experts, weights[..., None], 0).sum(1)  # [T, E]
    return (made * share.mT[..., None]).sum(0).to(x.dtype)
