"""The graph rewriter: a stateless decoder graph becomes the canonical stateful one.

One pass a file. Sharing is discovered from the dataflow; the config's layout is only compared with
it. `rewrite` works on a copy, so a pass that refuses leaves nothing half-rewritten.
"""

from dataclasses import dataclass

import onnx_ir as ir

from cla_export.layout import KVLayout
from cla_export.rewrite.classify_masks import classify_masks
from cla_export.rewrite.fuse_attention import fuse_attention
from cla_export.rewrite.fuse_rms_norm import fuse_rms_norm
from cla_export.rewrite.fuse_rotary import fuse_rotary
from cla_export.rewrite.group_attention import group_attention
from cla_export.rewrite.hoist_key_scale import hoist_key_scale
from cla_export.rewrite.keep_last_logits import keep_last_logits
from cla_export.rewrite.name_nodes import name_nodes
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.simplify import drop_unused, simplify
from cla_export.rewrite.split_rotation import split_rotation
from cla_export.rewrite.strip_repeat_kv import strip_repeat_kv
from cla_export.rewrite.structure import check_structure
from cla_export.rewrite.thread_caches import thread_caches


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The canonical graph, the sharing that was found in it, and what each pass did."""

    model: ir.Model
    layout: KVLayout
    reports: tuple[PassReport, ...]


def rewrite(stateless: ir.Model, expected: KVLayout | None = None) -> Rewritten:
    """Rewrite a stateless graph `(input_ids, position_ids) -> logits` into the canonical one.

    `expected` is the layout that a config promises; None accepts whatever is discovered.
    Raises GraphError where the graph cannot be understood or contradicts `expected`.
    """
    model = stateless.clone()
    reports = [simplify(model), fuse_attention(model)]
    if reports[-1].fired:
        reports.append(simplify(model))  # what it left around q, k and v
    reports += [
        strip_repeat_kv(model),
        fuse_rms_norm(model),
        split_rotation(model),
        fuse_rotary(model),
        hoist_key_scale(model),
        classify_masks(model),
    ]
    drop_unused(model)
    layout, grouped = group_attention(model, expected)
    reports += [grouped, thread_caches(model, layout), keep_last_logits(model), simplify(model)]
    reports.append(name_nodes(model))
    check_structure(model, layout)
    return Rewritten(model, layout, tuple(reports))
