"""What the gate found, as data."""

import math
from dataclasses import asdict, dataclass, field
from typing import cast

from cla_export.compare.metrics import LogitMetrics

SCHEMA = 2
ROLES = {  # of tensors within a layer, in the order they are computed
    "q": "query",
    "k": "new key",  # of an owner: what goes into the cache
    "v": "new value",
    "key_cache": "key cache after the call",  # of an owner's group
    "value_cache": "value cache after the call",
    "attention": "attention output",
    "attention_branch": "output projection",
    "router": "router's choice, by its scores",
    "mlp": "MLP output",
    "output": "layer output",
}


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
    mean_relative: float  # mean error, likewise
    profile: list[float]  # largest error in each stretch of positions, rows one after another
    logits: LogitMetrics | None  # of output "logits"
    mean_tolerance: float = math.inf

    @property
    def share(self) -> float:
        """How much of what is allowed it takes, by its largest or mean error; 1 is the limit."""
        pairs = (self.max_error, self.tolerance), (self.mean_error, self.mean_tolerance)
        return max(error / allowed if allowed else error and math.inf for error, allowed in pairs)


@dataclass(frozen=True, slots=True)
class CaseShape:
    """What one case ran: for each row, where in its slot it begins and how many tokens it has."""

    name: str
    about: str
    starts: list[int]
    tokens: list[int]
    logits_from: list[int]  # the first token of the row whose logits are compared


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
    unquantized: float | None = None  # of the reference with its weights before quantisation


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first step in execution order that differs: see compare.replay."""

    case: str
    call: int  # which run of the graph in that case, from 0
    layer: int
    group: int
    role: str  # one of ROLES
    row: int
    position: int  # of the token in its row
    channel: int
    got: float
    expected: float
    error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """One layer's line of the map: in each call, its worst tensor's error over tolerance."""

    layer: int
    shares: list[float]
    roles: list[str]  # which tensor that was


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Error by layer and call, of one case."""

    case: str
    calls: list[str]  # what each call was
    layers: list[LayerErrors]


@dataclass(frozen=True, slots=True)
class DebugFiles:
    """What --debug-dir left: one call's inputs, both sides' outputs, and how to run it again."""

    folder: str
    call: str
    commands: list[str]


@dataclass(frozen=True, slots=True)
class Regression:
    """Something that a baseline did better."""

    what: str
    before: str
    now: str


@dataclass(slots=True)
class ParityReport:
    """The gate's whole answer."""

    bundle: str
    reference: str
    target: str
    dtype: str
    arithmetic: str  # the row of the table of thresholds
    backend: str
    tokens: str
    seed: int
    length: int
    kv_layout: dict[str, list[int] | list[int | None]]  # of the bundle, as KVLayout.to_json
    cases: list[CaseShape] = field(default_factory=list)
    tensors: list[TensorResult] = field(default_factory=list)
    greedy: list[GreedyResult] = field(default_factory=list)
    perplexity: PerplexityResult | None = None
    divergence: Divergence | None = None
    layer_map: LayerMap | None = None
    inside: float | None = None  # largest share of its tolerance that a step in a layer took
    faults: list[str] = field(default_factory=list)  # by reading the graph, or why it cannot run
    baseline: str | None = None
    regressions: list[Regression] = field(default_factory=list)
    debug: DebugFiles | None = None
    tools: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        scored = self.perplexity is None or self.perplexity.passed
        generated = all(result.passed for result in self.greedy)
        compared = bool(self.tensors) and all(result.passed for result in self.tensors)
        right = self.divergence is None and not self.faults and not self.regressions
        return compared and generated and scored and right

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
