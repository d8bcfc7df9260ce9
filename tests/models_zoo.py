"""Tiny checkpoints with random weights, and exports of them that tests share."""

import fcntl
import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import own_decoder
import torch
from safetensors.torch import save_file
from torch import Tensor

from cla_export import layout
from cla_export.bundle import Bundle, open_bundle
from cla_export.engines.executor import Executor
from cla_export.exporter import export
from cla_export.layout import KVLayout
from cla_export.lower import Lowered
from cla_export.models import cla
from cla_export.models.checkpoint import (
    Checkpoint,
    load_model,
    open_checkpoint,
    save_checkpoint,
)
from cla_export.models.cla import ClaDecoder
from cla_export.models.decoder import Decoder
from cla_export.rewrite import Rewritten, rewrite
from cla_export.spec import ModelSpec
from cla_export.trace import trace

Config = dict[str, Any]

BASE: Config = {
    "model_type": "cla",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

PATTERNS: dict[str, tuple[int, ...]] = {  # as few layers as show the pattern
    "dense": layout.identity(2),
    "CLA2": layout.uniform(4, 2),
    "CLA3-first": layout.uniform(4, 3, "first"),
    "CLA3-last": layout.uniform(4, 3, "last"),
    "CLA4": layout.uniform(5, 4, "first"),
    "KeepEnds": layout.keep_ends(4),
    "DenseFront": layout.dense_front(5),
    "DenseBack": layout.dense_back(5),
    "non-contiguous": (0, 1, 0, 1),
    "one-owner": layout.one_owner(3),
}
MIXED: Config = {  # what most tests of a whole bundle use, so that it is exported once
    "kv_owner": (0, 1, 0),
    "sliding_window": 6,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
OWN_MODULE = "own_decoder:make"  # a module of a user's own, and configs of it
OWN: Config = {
    "vocab_size": 61,
    "width": 32,
    "max_position_embeddings": 64,
    "own_window": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN_STATED: Config = {  # with its KV layout
    **OWN,
    "num_hidden_layers": 4,
    "kv_owner": [0, 1, 1, 0],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 6,
    "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}  # of 4 query heads


def make_config(**overrides: Any) -> Config:
    """BASE with changes; `kv_owner` sets the number of layers too."""
    if "kv_owner" in overrides:
        overrides["kv_owner"] = list(overrides["kv_owner"])
        overrides.setdefault("num_hidden_layers", len(overrides["kv_owner"]))
    return {**BASE, **overrides}


def make_spec(**overrides: Any) -> ModelSpec:
    return cla.read_spec(make_config(**overrides))


def random_model(spec: ModelSpec, seed: int = 0) -> ClaDecoder:
    """A decoder whose logits are of order 1 to 5 and whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = cla.build(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
            elif name.startswith(("model.embed", "lm_head")):
                noise *= 2.0 / parameter.shape[1] ** 0.5
            else:
                gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                noise *= gain / parameter.shape[1] ** 0.5
            parameter.copy_(noise)
    return model.eval()


def make_checkpoint(
    folder: Path, *, seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any
) -> Path:
    """Write a model folder with small random weights."""
    config = make_config(**overrides)
    save_checkpoint(random_model(cla.read_spec(config), seed), folder, config, dtype=dtype)
    return folder


def save_own(folder: Path, config: Config) -> Path:
    """A model folder of a user's own module, with random weights; the tied head is stored once."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in own_decoder.make(config).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = noise * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1 + 0.1 * noise
    del tensors["head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.inference_mode()
def stateless_logits(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits [S, V] of one sequence recomputed from its first token."""
    ids = torch.tensor([tokens])
    return model(ids, torch.arange(len(tokens))[None])[0].float().numpy()


@torch.inference_mode()
def stateless_kv(model: Decoder, tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each group's K and V [Hkv, S, D] of one sequence."""
    ids = torch.tensor([tokens])
    groups = model.forward_with_kv(ids, torch.arange(len(tokens))[None])[1]
    return [(key[0].float().numpy(), value[0].float().numpy()) for key, value in groups]


def tokens_of(count: int, seed: int = 0, vocab: int = BASE["vocab_size"]) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def rows(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input_ids and position_ids, [B, S] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, BASE["vocab_size"], (batch, length), generator=generator)
    return ids, torch.arange(length).repeat(batch, 1)


@contextmanager
def without_gc() -> Iterator[None]:
    """Tracing makes millions of short-lived objects; looking through them is a quarter of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Zoo:
    """Checkpoints and bundles by configuration, made once per run and shared; do not edit them.

    A configuration is traced once per process whatever it is lowered for, and exported once per
    run whatever the number of pytest-xdist workers.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._traced: dict[tuple[ModelSpec, torch.dtype], Any] = {}

    def folder(self, **overrides: Any) -> Path:
        """The model folder of a configuration."""
        with self._made("model", overrides) as (path, missing):
            if missing:
                make_checkpoint(path, **overrides)
        return path

    def checkpoint(self, **overrides: Any) -> Checkpoint:
        return open_checkpoint(self.folder(**overrides))

    def model(self, **overrides: Any) -> ClaDecoder:
        return load_model(self.checkpoint(**overrides))

    def canonical(self, **overrides: Any) -> Rewritten:
        """The canonical graph, compared with the configuration's own layout."""
        spec = make_spec(**overrides)
        return rewrite(self.trace(cla, spec, torch.float32), spec.layout)

    def bundle(
        self,
        target: str = "onnxruntime",
        dtype: str = "fp32",
        quantize: str | None = None,
        attention: str | None = None,
        kv_cache: str | None = None,
        **overrides: Any,
    ) -> Bundle:
        """An exported configuration."""
        source = self.folder(**overrides)
        options = {"target": target, "dtype": dtype, "quantize": quantize, "attention": attention}
        options |= {"kv_cache": kv_cache}
        kind = "-".join(str(option) for option in options.values())
        with self._made(kind, overrides) as (path, missing):
            if missing:
                with patch("cla_export.trace.trace", self.trace):
                    export(source, path, **options)
        return open_bundle(path, verify=False)

    def trace(self, family: Any, spec: ModelSpec, dtype: torch.dtype) -> Any:
        """`cla_export.trace.trace`, remembered: whoever rewrites the result works on a copy."""
        if (spec, dtype) not in self._traced:
            with without_gc():
                self._traced[spec, dtype] = trace(family, spec, dtype)
        return self._traced[spec, dtype]

    @contextmanager
    def _made(self, kind: str, overrides: Config) -> Iterator[tuple[Path, bool]]:
        """The place of one artefact, and whether the caller has to make it; others wait."""
        text = json.dumps(make_config(**overrides), sort_keys=True)
        path = self._root / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path, not path.exists()


def write_graph(
    folder: Path, lowered: Lowered, kv_layout: KVLayout, *, vocab: int, positions: int
) -> Bundle:
    """The least that an executor needs of a bundle: a graph with its weights, and its limits."""
    folder.mkdir()
    ir.save(lowered.model, folder / "model.onnx")
    limits = {"vocab_size": vocab, "max_positions": positions}
    manifest = {"target": lowered.target, "dtype": "float32", "limits": limits}
    return Bundle(folder, manifest, kv_layout)


def drive(executor: Executor, texts: list[list[int]], prompts: list[int]) -> list[np.ndarray]:
    """Each text's logits from its prompt's last token on: one ragged prefill, then ragged decode.

    Texts must all be as much longer than their prompts.
    """
    (steps,) = {len(text) - prompt for text, prompt in zip(texts, prompts, strict=True)}
    found = [executor.prefill_rows(0, [text[:n] for text, n in zip(texts, prompts, strict=True)])]
    for step in range(steps):
        held = [prompt + step for prompt in prompts]
        new = [text[n] for text, n in zip(texts, held, strict=True)]
        found.append(executor.decode(range(len(texts)), new, held))
    return [np.stack([logits[row] for logits in found]) for row in range(len(texts))]
