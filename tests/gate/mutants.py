"""All mutants: realistic export bugs, each of which the gate must catch and place.

cache_mutants    who reads and writes which cache, and when
attention_mutants  what attention computes: masks, scale, heads, RoPE
weight_mutants   values: swapped, rounded, lost
quantization_mutants  scales, zero points and packing
int8_cache_mutants  scales of int8 caches
layer_mutants    the rest of the network: norms, residuals, MLP, head
engine_mutants   a right graph in a wrong executor: lengths, slots, stale state
"""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import attention_mutants
import cache_mutants
import engine_mutants
import int8_cache_mutants
import layer_mutants
import quantization_mutants
import weight_mutants
from subject import MUTANTS, Mutant, Place, Subject

from cla_export.bundle import Bundle
from cla_export.compare.gate import compare_bundle
from cla_export.compare.report import ParityReport

__all__ = ["LAYOUTS", "MUTANTS", "Mutant", "Outcome", "Place", "Subject", "run"]
_MODULES = (
    cache_mutants,
    attention_mutants,
    weight_mutants,
    quantization_mutants,
    int8_cache_mutants,
    layer_mutants,
    engine_mutants,
)

_LONG = {"max_position_embeddings": 176}  # the gate's full length, and spare places behind it
LAYOUTS: dict[str, dict] = {  # name -> target, dtype, quantize and configuration
    "mqa-cla2": {
        "kv_owner": (0, 0, 2, 2),
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_size": 32,  # q_proj is square
        **_LONG,
    },
    "gqa-noncontiguous": {
        "kv_owner": (0, 1, 0, 1, 4),
        "head_dim": 24,
        "hidden_size": 24,
        "tie_word_embeddings": False,
        **_LONG,
    },
    "gqa-cla3-window-norms-biases": {
        "kv_owner": (0, 0, 0, 3, 3),
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2,
        "sliding_window": 9,
        "qk_norm": True,
        "attention_bias": True,
        "separate_kv_norm": True,
        **_LONG,
    },
    "gqa-head-dim-10": {
        "kv_owner": (0, 0, 2, 2),
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        "sliding_window": 7,
        "head_dim": 10,
        "hidden_size": 40,
        **_LONG,
    },
}
LAYOUTS |= {
    "portable/gqa-noncontiguous": {"target": "portable", **LAYOUTS["gqa-noncontiguous"]},
    "portable/gqa-cla3-window-norms-biases": {
        "target": "portable",
        **LAYOUTS["gqa-cla3-window-norms-biases"],
    },
    "float16/mqa-cla2": {"dtype": "fp16", **LAYOUTS["mqa-cla2"]},
    "int8/gqa-cla3-window-norms-biases": {
        "quantize": "int8",
        **LAYOUTS["gqa-cla3-window-norms-biases"],
    },
    "int4/gqa-noncontiguous": {"quantize": "int4", **LAYOUTS["gqa-noncontiguous"]},
    "kv8/gqa-noncontiguous": {"kv_cache": "int8", **LAYOUTS["gqa-noncontiguous"]},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the gate said of one mutant of one bundle, and where it should have said it is."""

    mutant: Mutant
    place: Place
    report: ParityReport
    invisible: str | None  # why the gate need not see it

    @property
    def case(self) -> str:
        """The first case, or other check, that fails."""
        failed = next((r.case for r in self.report.tensors if not r.passed), None)
        if failed is not None:
            return failed
        if not all(result.passed for result in self.report.greedy):
            return "greedy"
        if self.report.perplexity is not None and not self.report.perplexity.passed:
            return "perplexity"
        if self.report.divergence is not None:
            return "layers"
        return "reading" if self.report.faults else "passed"

    @property
    def found(self) -> str:
        """Where the gate says it is: the first divergence, else what fails."""
        if (first := self.report.divergence) is not None:
            return f"layer {first.layer} {first.role}"
        if self._only_read:
            return self._faults
        caches = self._failing_caches()
        return f"cache {', '.join(map(str, sorted(caches)))}" if caches else "logits"

    @property
    def _only_read(self) -> bool:
        return self.case == "reading"

    @property
    def _faults(self) -> str:
        return "; ".join(self.report.faults)

    def _failing_caches(self) -> set[int]:
        """Of the first case that fails: later ones decode from what it left."""
        failed = (r for r in self.report.tensors if not r.passed and r.case == self.case)
        return {result.group for result in failed if result.group is not None}

    def problem(self) -> str | None:
        """Why this outcome is not good enough, or None."""
        first, place = self.report.divergence, self.place
        if self.report.passed:
            return "survived"
        if self._only_read:
            named = place.layer is None or any(
                f"layers.{place.layer}{end}" in self._faults for end in "./"
            )
            return None if named else f"in layer {place.layer}, but found at {self.found}"
        if place.outside:
            wrong = first is not None or bool(self._failing_caches())
            return f"outside the layers, but found at {self.found}" if wrong else None
        if place.layer is not None and (first is None or first.layer != place.layer):
            return f"in layer {place.layer}, but found at {self.found}"
        if place.role is not None and (first is None or first.role != place.role):
            return f"in {place.role} of layer {place.layer}, but found at {self.found}"
        if place.groups is None:
            return None
        named = self._failing_caches() if first is None else {first.group}
        if not named or not named <= set(place.groups):
            return f"in group {place.groups}, but found at {self.found}"
        return None


def run(mutant: Mutant, bundle: Bundle, folder: Path) -> Outcome | None:
    """Commit a mutant to a copy of a bundle in an empty folder and let the gate judge it.

    None if there is nothing in this bundle that it could spoil.
    """
    subject = Subject(bundle)
    if not mutant.applies(subject):
        return None
    place = mutant.apply(subject)
    why = mutant.invisible(subject)
    spoilt = subject.save(folder)
    with patch("polygraphy.comparator.util.log_output_stats"):  # half the time, and never read
        report = compare_bundle(spoilt, threads=1, onnxruntime=subject.engine)
    return Outcome(mutant, place, report, why)
