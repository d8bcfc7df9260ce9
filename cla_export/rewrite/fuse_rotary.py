"""Fuse rotary: RoPE written by hand becomes one RotaryEmbedding, with the model's own angles.

The cosines and sines stay what PyTorch computed or stored: they enter the operator as [B, S, D/2],
gathered once per graph, and are never recomputed from theta (an ulp in an inverse frequency is
5e-4 of angle at position 8192).

Cases, on x [B, H, S, D] with cos and sin unsqueezed at axis 1 from [B, S, D/2]:
1. halves: Concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), x1 and x2 from one Split of the last
   axis in two.

In 16 bits the rows are cast after they are unsqueezed, and nothing fires here: what the operator
rounds, and how often, is a runtime's choice (`lower.fuse_rounded_rotary`).
"""

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleSet
from onnxscript.rewriter.pattern import OpsetPatternBuilder, RewriteRule

from cla_export.rewrite.report import PassReport, Skip, describe
from cla_export.rewrite.values import ints, producer


def fuse_rotary(model: ir.Model) -> PassReport:
    report = PassReport("fuse_rotary")

    def check(
        _context: object, x: ir.Value, first: ir.Value, cos: ir.Value, sin: ir.Value, **_: object
    ) -> MatchResult:
        refusal = _refusal(x, first, cos, sin)
        if refusal is None:
            return MatchResult()
        reason, got = refusal
        split = first.producer()
        assert split is not None
        report.skips.append(Skip(describe(split), reason, str(got)))
        return MatchResult().fail(reason, x)

    rule = RewriteRule(_halves, _replacement, check, name="rotary_halves")
    report.fired = RewriteRuleSet([rule], commute=True).apply_to_model(model)
    return report


def _refusal(
    x: ir.Value, first: ir.Value, cos: ir.Value, sin: ir.Value
) -> tuple[str, object] | None:
    """Why a match is not RoPE on halves, and the value that shows it; None if it is."""
    if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return "x is not [B, H, S, D] with constant D", x.shape
    half = [*x.shape[:3], x.shape[3] // 2]
    if first.shape is None or list(first.shape) != half or x.shape[3] % 2:
        return "x is not split into halves of its last axis", first.shape
    for name, table in (("cos", cos), ("sin", sin)):
        unsqueeze = producer(table, "Unsqueeze")
        if unsqueeze is None or ints(unsqueeze.inputs[1]) != [1]:
            return f"{name} is not unsqueezed at axis 1", table.shape
        rows = unsqueeze.inputs[0]
        wanted = [x.shape[0], x.shape[2], half[3]]
        if rows is None or rows.shape is None or list(rows.shape) != wanted:
            return f"{name} is not [B, S, D/2]", rows.shape if rows is not None else None
    return None


def _halves(op: OpsetPatternBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    first, second = op.Split(x, _allow_other_attributes=True, _outputs=["first", "second"])
    rotated: ir.Value = op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        axis=-1,
    )
    return rotated


def _replacement(
    op: ir.tape.Tape, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: object
) -> ir.Value:
    cos_rows = cos.producer().inputs[0]  # type: ignore[union-attr]  # checked: an Unsqueeze
    sin_rows = sin.producer().inputs[0]  # type: ignore[union-attr]
    return op.RotaryEmbedding(x, cos_rows, sin_rows)  # type: ignore[attr-defined,no-any-return]
