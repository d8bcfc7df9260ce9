"""The portable target: standard ONNX operators only, the canonical graph as it stands.

write_indices [B] int64   tokens each row holds before the call
kv_lengths    [B] int64   tokens each row holds after it
"""

import onnx_ir as ir

from cla_export.layout import KVLayout


def lower(_model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    return [("Attention", "standard operator")] * layout.num_groups
