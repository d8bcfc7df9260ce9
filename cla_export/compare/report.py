"""What the gate found, as data."""

import math
from dataclasses import asdict, dataclass, field
from typing import cast

from cla_export.compare.metrics import LogitMetrics

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One output of one case. Errors are absolute unless named otherwise."""

    case: str
    output: str  # logits, or cache.{group}.key / .value
    group: int | None
    passed: bool
    max_error: float
    mean_error: float
    rms: float  # of the reference
    tolerance: float
    row: int  # where the largest error is
    position: int
    cosine: float
    max_relative: float  # largest error over the reference's rms
    profile: list[float]  # largest error in each stretch of positions, rows one after another
    logits: LogitMetrics | None  # of output "logits"
    mean_tolerance: float = math.inf


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """Free-running greedy generation from one prompt."""

    prompt: int
    tokens: int
    agreeing: int
    near_ties: int
    first_divergence: int | None
    gap: float | None  # between the reference's best logit and the bundle's choice, there
    passed: bool


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Perplexity per token on the text, both sides over the same windows."""

    text: str
    tokens: int
    reference: float
    bundle: float
    difference: float  # relative
    tolerance: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first value in execution order that differs, found by replaying a failed case."""

    case: str
    call: int  # which run of the graph in that case, from 0
    layer: int
    group: int
    role: str  # q, k, v, attention (its output), output (of the layer)
    row: int
    position: int  # of the token in its row
    channel: int
    got: float
    expected: float
    error: float
    tolerance: float


@dataclass(slots=True)
class ParityReport:
    """The gate's whole answer."""

    bundle: str
    reference: str
    target: str
    dtype: str
    backend: str
    tokens: str
    length: int
    kv_layout: dict[str, list[int] | list[int | None]]  # of the bundle, as KVLayout.to_json
    tensors: list[TensorResult] = field(default_factory=list)
    greedy: list[GreedyResult] = field(default_factory=list)
    perplexity: PerplexityResult | None = None
    divergence: Divergence | None = None
    graph_faults: list[str] = field(default_factory=list)  # see compare.reading
    tools: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        scored = self.perplexity is None or self.perplexity.passed
        generated = all(result.passed for result in self.greedy)
        compared = bool(self.tensors) and all(result.passed for result in self.tensors)
        return compared and generated and scored and not self.graph_faults

    @property
    def greedy_agreement(self) -> float:
        """Share of free-running tokens that agree, 0 to 1."""
        total = sum(result.tokens for result in self.greedy)
        return sum(result.agreeing for result in self.greedy) / total if total else 1.0

    def worst(self, output: str) -> TensorResult:
        """The result with the largest error among an output's cases."""
        return max((r for r in self.tensors if r.output == output), key=lambda r: r.max_error)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; an error that is not finite becomes null, which JSON can say."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "greedy_agreement": self.greedy_agreement,
            **cast("dict[str, object]", _finite(asdict(self))),
        }


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
