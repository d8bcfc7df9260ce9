"""Decoders as a user would write them: imported by name, as `--module` imports them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.functional import scaled_dot_product_attention as attend

HEADS, DIM, EPS = 4, 16, 3e-6
PAIRS = (0, 1, 1, 0)  # layers 0 and 3 read one pair of keys and values, layers 1 and 2 another


class Own(nn.Module):
    """Learned norms, a table of angles, a tied head, a window in the pair of layers 1 and 2."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, vocab = config["width"], config["vocab_size"]
        self.window = config.get("own_window")
        self.words = nn.Embedding(vocab, width)
        self.asks = nn.ModuleList(nn.Linear(width, HEADS * DIM) for _ in PAIRS)
        self.outs = nn.ModuleList(nn.Linear(HEADS * DIM, width, bias=False) for _ in PAIRS)
        self.tells = nn.ModuleList(nn.Linear(width, 2 * DIM) for _ in range(2))
        self.norms = nn.ParameterList(torch.ones(width) for _ in PAIRS)
        self.register_buffer("gain", torch.ones(width))  # of the checkpoint
        places = torch.arange(config["max_position_embeddings"])[:, None]
        angles = places * 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = (t[position_ids].unsqueeze(1) for t in (self.cos, self.sin))

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            c, s = cos.to(x.dtype), sin.to(x.dtype)
            return torch.cat((a * c - b * s, b * c + a * s), -1)

        x = self.words(input_ids) * self.gain.to(self.words.weight.dtype)
        made: list[tuple[Tensor, Tensor]] = []
        for layer, pair in enumerate(PAIRS):
            h = rms_norm(x, x.shape[-1:], self.norms[layer], EPS)
            if pair == len(made):
                k, v = self.tells[pair](h).unsqueeze(1).chunk(2, -1)
                made.append((turn(k), v))
            q = turn(self.asks[layer](h).unflatten(-1, (HEADS, DIM)).transpose(1, 2))
            mask = None
            if self.window is not None and pair:
                place = torch.arange(input_ids.shape[1])
                far = place[:, None] - place[None]
                mask = (far >= 0) & (far < self.window)
            y = attend(q, *made[pair], attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            x = x + torch.tanh(self.outs[layer](y.transpose(1, 2).flatten(2)))
        return self.head(x)


def make(config: dict) -> nn.Module:
    return Own(config)


def fails(config: dict) -> nn.Module:
    raise KeyError("depth")


def no_module(config: dict) -> dict:
    return config


class Tokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def other_arguments(config: dict) -> nn.Module:
    return Tokens()


class Bag(nn.Module):
    """Sees no other token."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.words = nn.Embedding(config["vocab_size"], config["vocab_size"])

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.words(input_ids)


def no_attention(config: dict) -> nn.Module:
    return Bag(config)


class Loud(Bag):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if input_ids.sum() > 0:
            return self.words(input_ids)
        return self.words(position_ids)


def by_values(config: dict) -> nn.Module:
    return Loud(config)


class Short(Bag):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.words(input_ids)[:, -1]


def last_logits(config: dict) -> nn.Module:
    return Short(config)


def untied(config: dict) -> nn.Module:
    module = Own(config)
    module.head = nn.Linear(config["width"], config["vocab_size"], bias=False)
    return module


class Loose(Own):
    """Keeps a tensor that is neither a parameter nor a buffer."""

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.shift = torch.linspace(0, 1, config["vocab_size"])

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, position_ids) + self.shift


def loose(config: dict) -> nn.Module:
    return Loose(config)


not_a_function = 7
