"""Lowering: the canonical graph becomes what one runtime runs best. One file a target.

A target is a module with `lower(model, layout)`, which edits the copy it is given and returns, for
each group, the operator that group's attention ended up as.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import onnx_ir as ir

from cla_export.errors import BadInput
from cla_export.graph_reading import read_model
from cla_export.layout import KVLayout

TARGETS: Mapping[str, str] = {
    "onnxruntime": "cla_export.lower.onnxruntime",
    "portable": "cla_export.lower.portable",
    "tensorrt": "cla_export.lower.tensorrt",
    "tensorrt-rtx": "cla_export.lower.tensorrt",
}
# Second graphs in bundles of target onnxruntime, over the same weights.
CPU = "onnxruntime-cpu"
CUDA = "onnxruntime-cuda"
CUDA_PLUGIN = "onnxruntime-cuda-plugin"
COMPANIONS: Mapping[str, str] = {
    CPU: "cla_export.lower.onnxruntime_cpu",
    CUDA: "cla_export.lower.onnxruntime_cuda",
    CUDA_PLUGIN: "cla_export.lower.cuda_operators",
}


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph for one target. `attention[g]` is the operator of group g, `reasons[g]` why."""

    target: str
    model: ir.Model
    attention: tuple[str, ...]
    reasons: tuple[str, ...]


def check_target(target: str) -> str:
    """Return a target's name; refuse an unknown one with the list of those there are."""
    if target not in TARGETS:
        raise BadInput(f"target is {target!r}; expected one of {', '.join(sorted(TARGETS))}")
    return target


def lower(target: str, canonical: ir.Model, layout: KVLayout, **options: str) -> Lowered:
    """Lower a canonical graph to a target, or to a companion; the canonical one is left as it is.

    `options` are the target's own, such as `attention` of TensorRT's.
    """
    module = import_module(COMPANIONS.get(target) or TARGETS[check_target(target)])
    model = canonical.clone()
    choices: list[tuple[str, str]] = module.lower(model, layout, **options)
    facts, found, _, _ = read_model(model, target)
    if found != layout or facts.cache_inputs != 2 * layout.num_groups:
        raise AssertionError(f"lowering to {target} changed who shares: {found} from {layout}")
    return Lowered(
        target, model, tuple(operator for operator, _ in choices), tuple(why for _, why in choices)
    )
