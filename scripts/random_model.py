"""A decoder with random weights, caches filled with made-up numbers, and prompts of random tokens.

They come from fixed seeds: whatever is compared has the same.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cla_export.layout import KVLayout, uniform

if TYPE_CHECKING:
    import torch

    from cla_export.models.cla import ClaDecoder

Floats = NDArray[np.float32]
Prompts = NDArray[np.int64]  # [B, S]

SHAPE = {
    "layers": 12, "hidden": 768, "ffn": 2048, "heads": 12, "kv_heads": 1, "head_dim": 64,
    "vocab": 32000,
}  # fmt: skip


def add_shape_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """An option for each of `SHAPE`, with these defaults where they are others."""
    shape = parser.add_argument_group("shape of a model with random weights")
    for name, default in {**SHAPE, **defaults}.items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")


def config_of(shape: argparse.Namespace, factor: int, positions: int) -> dict[str, object]:
    """config.json of a model of this shape, whose neighbours share by `factor`."""
    return {
        "model_type": "cla",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "kv_owner": list(uniform(shape.layers, factor, "first")),
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }


def make_model(
    folder: Path,
    config: Mapping[str, object],
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
) -> "ClaDecoder":
    """Write a checkpoint with random weights, normal, scaled by the width of their input."""
    import torch

    from cla_export.models import cla
    from cla_export.models.checkpoint import save_checkpoint

    torch.manual_seed(0)
    model = cla.build(cla.read_spec(config)).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    save_checkpoint(model.cpu(), folder, config)
    return model.to(device)


def made_up(
    layout: KVLayout, batch: int, tokens: int, only: int | None = None
) -> Iterator[tuple[int, int, Floats, Floats]]:
    """Group, slot, keys and values, each [Hkv, T, D], of normal numbers; `only` one group's."""
    groups = layout.groups if only is None else layout.groups[only : only + 1]
    for group in groups:
        for slot in range(batch):
            random = np.random.default_rng([group.index, slot])
            shape = (2, group.kv_heads, tokens, group.head_dim)
            keys, values = random.standard_normal(shape, np.float32)
            yield group.index, slot, keys, values


def prompts(batch: int, length: int, vocab: int) -> Prompts:
    """Random tokens [B, S]; the first three of the vocabulary are left out, as special."""
    return np.random.default_rng(length).integers(3, vocab, (batch, length))
