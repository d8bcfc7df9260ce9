"""What each rewrite pass makes of its example, `graphs/passes/<pass>[.<case>]/before.onnxtxt`.

A new pass needs a line in PASSES and a folder with a `before`; regen_graphs.py writes the `after`.
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from cla_export.errors import GraphError
from cla_export.graph_text import from_text, to_text
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
from cla_export.rewrite.simplify import simplify
from cla_export.rewrite.split_rotation import split_rotation
from cla_export.rewrite.strip_repeat_kv import strip_repeat_kv
from cla_export.rewrite.thread_caches import thread_caches


def _group(model: ir.Model) -> tuple[KVLayout, PassReport]:
    return group_attention(model, expected=None)


def _thread(model: ir.Model) -> PassReport:
    return thread_caches(model, _group(model)[0])


PASSES: Mapping[str, Callable[[ir.Model], PassReport | tuple[KVLayout, PassReport]]] = {
    "simplify": simplify,
    "fuse_attention": fuse_attention,
    "strip_repeat_kv": strip_repeat_kv,
    "fuse_rms_norm": fuse_rms_norm,
    "split_rotation": split_rotation,
    "fuse_rotary": fuse_rotary,
    "hoist_key_scale": hoist_key_scale,
    "classify_masks": classify_masks,
    "group_attention": _group,
    "thread_caches": _thread,
    "keep_last_logits": keep_last_logits,
    "name_nodes": name_nodes,
}


def after(example: str, before: str) -> str:
    """The `after` text of one example: what the pass reports as comments, then the graph.

    Where the pass refuses the graph, its message alone.
    """
    model = from_text(before)
    try:
        done = PASSES[example.partition(".")[0]](model)
    except GraphError as error:
        return "".join(f"# {line}\n" for line in f"refused: {error}".splitlines())
    layout, report = done if isinstance(done, tuple) else (None, done)
    comments = [f"{report.name}: fired {report.fired}"]
    if layout is not None:
        comments += [layout.describe(), *(f"{key}: {row}" for key, row in layout.to_json().items())]
    comments += [
        f"skip: {skip.node}: {skip.reason}" + (f" (got {skip.got})" if skip.got else "")
        for skip in report.skips
    ]
    return to_text(model, comments)


def normalised(before: str) -> str:
    """A hand-written graph as the printer prints it, its leading comments kept."""
    comments = [line.removeprefix("#").strip() for line in before.partition("\n<")[0].splitlines()]
    return to_text(from_text(before), comments)
