"""Strip repeat_kv: give Attention the true KV heads instead of copies, one per query head.

Models that expand K and V by hand do `Reshape(Expand(Unsqueeze(k, 2), ...), ...)`, which is what
Attention does by itself when it has fewer KV heads than query heads.

Cases:
1. Both K and V are expanded by Unsqueeze at axis 2, Expand, Reshape: both are bypassed.
2. Anything else is left alone, with the reason.
"""

import onnx_ir as ir

from cla_export.rewrite.report import PassReport
from cla_export.rewrite.values import attention_nodes, ints, producer


def strip_repeat_kv(model: ir.Model) -> PassReport:
    report = PassReport("strip_repeat_kv")
    for node in attention_nodes(model.graph):
        sources = []
        for role, value in (("key", node.inputs[1]), ("value", node.inputs[2])):
            source, reason = _unexpanded(value)
            if source is None:
                report.skip(node, f"{role}: {reason}", value.shape if value else None)
            else:
                sources.append(source)
        if len(sources) == 2:
            node.replace_input_with(1, sources[0])
            node.replace_input_with(2, sources[1])
            report.fired += 1
    return report


def _unexpanded(value: ir.Value | None) -> tuple[ir.Value | None, str]:
    """The [B, Hkv, S, D] value under a head expansion, or why there is none."""
    reshape = producer(value, "Reshape")
    if reshape is None:
        return None, "not made by a Reshape, so its heads are taken as true KV heads"
    expand = producer(reshape.inputs[0], "Expand")
    if expand is None:
        return None, "a Reshape, but not of an Expand"
    unsqueeze = producer(expand.inputs[0], "Unsqueeze")
    if unsqueeze is None or ints(unsqueeze.inputs[1]) != [2]:
        return None, "an Expand, but not of an Unsqueeze at axis 2 (repeats of each KV head)"
    source = unsqueeze.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None, "the value under the expansion is not [B, Hkv, S, D]"
    repeated = expand.outputs[0].shape  # [B, Hkv, repeats, S, D]
    merged = value.shape if value is not None else None
    if repeated is None or merged is None or len(repeated) != 5 or len(merged) != 4:
        return None, "the expansion is not [B, Hkv, repeats, S, D] merged into [B, Hq, S, D]"
    heads, repeats = repeated[1], repeated[2]
    if not isinstance(heads, int) or not isinstance(repeats, int) or merged[1] != heads * repeats:
        return None, f"its Reshape to {merged} does not merge heads and repeats"
    return source, ""
