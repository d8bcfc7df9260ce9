"""The metrics of all replicas in one text: Prometheus asks Ray's proxy, which asks any of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric, generate_latest


@dataclass(frozen=True, slots=True)
class _Found:
    """What `generate_latest` needs of a registry."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def merged(found: Mapping[str, Iterable[Metric]]) -> bytes:
    """Prometheus' text of metrics by replica; each sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, metrics in found.items():
        for metric in metrics:
            empty = Metric(metric.name, metric.documentation, metric.type)
            family = families.setdefault(metric.name, empty)
            family.samples += [
                sample._replace(labels={"replica": replica, **sample.labels})
                for sample in metric.samples
            ]
    return bytes(generate_latest(_Found(families.values())))
