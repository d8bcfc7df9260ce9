"""A decoder as a user would write it who has never heard of scaled_dot_product_attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEADS, DIM = 4, 8


class Spelt(nn.Module):
    """Three layers: two ask one pair of keys and values without a heads' axis, in grouped einsum.

    The last has its own, and does call PyTorch's attention with `mixed` in the config.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, vocab = HEADS * DIM, config["vocab_size"]
        self.mixed = config.get("mixed", False)
        self.words = nn.Embedding(vocab, width)
        self.places = nn.Embedding(config["max_position_embeddings"], width)
        self.fused = nn.Linear(width, width + 2 * DIM)
        self.ask = nn.Linear(width, width)
        self.last = nn.Linear(width, 3 * width)
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(position_ids)
        hidden = position_ids[:, :, None] < position_ids[:, None]  # [B, S, S]
        q, k, v = self.fused(self.norms[0](x)).split([HEADS * DIM, DIM, DIM], -1)
        x = x + self.outs[0](self.shared(q, k, v, hidden))
        x = x + self.outs[1](self.shared(self.ask(self.norms[1](x)), k, v, hidden))
        q, k, v = self.last(self.norms[2](x)).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        if self.mixed:
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = torch.einsum("bhsd,bhtd->bhst", q, k) / DIM**0.5
            y = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ v
        x = x + self.outs[2](y.transpose(1, 2).flatten(2))
        return self.head(self.norms[3](x))

    def shared(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """q [B, S, heads * D], k and v [B, S, D] -> [B, S, heads * D]."""
        q = q.unflatten(-1, (2, HEADS // 2, DIM))
        scores = torch.einsum("bskgd,btd->bkgst", q, k) * DIM**-0.5
        scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return torch.einsum("bkgst,btd->bskgd", weights, v).flatten(2)


def make(config: dict) -> nn.Module:
    return Spelt(config)
