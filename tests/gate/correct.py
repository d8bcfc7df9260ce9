"""Correct bundles of many kinds, for measuring how close the gate comes to a false alarm."""

from dataclasses import dataclass
from typing import Any

import torch
from models_zoo import Zoo
from mutants import LAYOUTS

from cla_export.compare.gate import compare_bundle
from cla_export.compare.report import ParityReport

INT8_CACHE = "+kv8"  # behind the dtype of weights: caches are int8
_LAYOUTS = [name for name in LAYOUTS if "/" not in name]
_POSITIONS = (176, 90)  # other row lengths, so other chunks and prompts


@dataclass(frozen=True, slots=True)
class Trial:
    """One correct bundle and the way it is compared. Seed 0, 1, 2, ... goes through all ways."""

    seed: int
    dtype: str

    @property
    def quantize(self) -> str | None:
        weights = self.dtype.removesuffix(INT8_CACHE)
        return weights if weights.startswith("int") else None

    @property
    def kv_cache(self) -> str | None:
        return "int8" if self.dtype.endswith(INT8_CACHE) else None

    @property
    def layout(self) -> str:
        name = _LAYOUTS[self.seed % len(_LAYOUTS)]
        narrow = self.kv_cache is not None and "dim-10" in name  # which no int8 cache has
        return _LAYOUTS[self.seed // len(_LAYOUTS) % 3] if narrow else name

    @property
    def threads(self) -> int:
        return 1 + self.seed // len(_LAYOUTS) % 2

    @property
    def positions(self) -> int:
        return _POSITIONS[self.seed // (2 * len(_LAYOUTS)) % len(_POSITIONS)]

    @property
    def target(self) -> str:
        portable = self.seed % 3 == 2 and self.quantize is None and self.kv_cache is None
        return "portable" if portable else "onnxruntime"

    def run(self, zoo: Zoo, model_seed: int | None = None) -> ParityReport:
        """Compare with weights of `model_seed` (None: of this seed) and prompts of this seed."""
        config: dict[str, Any] = {**LAYOUTS[self.layout], "max_position_embeddings": self.positions}
        seed = self.seed if model_seed is None else model_seed
        config |= {"seed": seed} if seed else {}
        dtype = "fp32" if self.quantize or self.kv_cache else self.dtype
        bundle = zoo.bundle(self.target, dtype, self.quantize, kv_cache=self.kv_cache, **config)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return compare_bundle(bundle, seed=self.seed, threads=self.threads)
        finally:
            torch.set_num_threads(before)

    def __str__(self) -> str:
        return (
            f"{self.layout} {self.dtype} {self.target}, {self.positions} positions, seed "
            f"{self.seed}, {self.threads} threads"
        )


def worst_share(report: ParityReport) -> float:
    """The largest error of the report over what is allowed for it; above 1 it is an alarm."""
    shares = [result.share for result in report.tensors]
    if report.perplexity is not None:
        shares.append(report.perplexity.difference / report.perplexity.tolerance)
    return max(shares)
