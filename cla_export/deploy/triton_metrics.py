"""The engine's metrics, told to Triton, which shows them beside its own.

Importable only in Triton's Python backend. Histograms stay out: not every Triton has them.
"""

from typing import Any

import triton_python_backend_utils as pb

from cla_export.serve.engine import Engine
from cla_export.serve.metrics import Metrics

_KINDS = {"gauge": "GAUGE", "counter": "COUNTER"}


class TritonMetrics:
    """Gauges and counters of an engine, with the model's name and version as labels."""

    def __init__(self, metrics: Metrics, engine: Engine, model: str, version: str) -> None:
        self._metrics = metrics
        self._engine = engine
        self._labels = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._told: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}

    def update(self) -> None:
        """Tell Triton what they are now."""
        for family in self._metrics.families(self._engine):
            kind = _KINDS.get(family.type)
            for sample in family.samples:
                if kind is None or sample.name.endswith("_created"):
                    continue
                metric = self._metric(sample.name, family.documentation, kind, sample.labels)
                if kind == "GAUGE":
                    metric.set(sample.value)
                else:
                    metric.increment(sample.value - metric.value())

    def _metric(self, name: str, said: str, kind: str, labels: dict[str, str]) -> Any:  # noqa: ANN401
        key = name, frozenset(labels.items())
        if key not in self._told:
            if name not in self._families:
                of = getattr(pb.MetricFamily, kind)
                self._families[name] = pb.MetricFamily(name=name, description=said, kind=of)
            self._told[key] = self._families[name].Metric(labels={**self._labels, **labels})
        return self._told[key]
