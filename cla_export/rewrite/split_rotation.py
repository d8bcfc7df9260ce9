"""Split rotation: RoPE by `rotate_half` becomes RoPE on halves, which `fuse_rotary` knows.

    x * cos + Concat(-x2, x1) * sin  ->  Concat(x1 * c - x2 * s, x2 * c + x1 * s)

where x1 and x2 are the halves of x, and cos and sin are c and s twice. The numbers are the same: to
negate a factor, or to add a negated product, rounds nothing.

Cases, on x [B, H, S, D] with cos and sin unsqueezed at axis 1 from [B, S, D]:
1. cos and sin are Concats of one value with itself.
2. These are rounded rows of a table: the Cast goes behind the Unsqueeze, where
   `lower.fuse_rounded_rotary` looks for it.
3. x is [B, S, H, D], cos and sin are unsqueezed at axis 2, and what comes out is transposed to
   [B, H, S, D] and read nowhere else (Gemma): x is transposed in its place.
"""

import onnx_ir as ir

from cla_export.rewrite.builder import Builder
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import ints, producer


def split_rotation(model: ir.Model) -> PassReport:
    report = PassReport("split_rotation")
    tape = ir.tape.Tape(model.graph)
    columns: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "Add":
            _split(model.graph, tape, node, columns, report)
    if report.fired:
        model.graph.sort()
        drop_unused(model)
    return report


def _split(
    graph: ir.Graph,
    tape: ir.tape.Tape,
    add: ir.Node,
    columns: dict[ir.Value, ir.Value],
    report: PassReport,
) -> None:
    for plain, turned in (add.inputs, reversed(add.inputs)):
        straight, crossed = producer(plain, "Mul"), producer(turned, "Mul")
        if straight is None or crossed is None:
            continue
        for half_turn, sin in (crossed.inputs, reversed(crossed.inputs)):
            x = _rotated_half(half_turn)
            if x is None or x not in straight.inputs:
                continue
            cos = straight.inputs[1 - straight.inputs.index(x)]
            transpose = _heads_first(add)  # 3
            axis = 1 if transpose is None else 2
            rows = [_half_rows(table, axis) for table in (cos, sin)]
            if None in rows:
                report.skip(
                    add, f"cos or sin is not the same half twice, unsqueezed at axis {axis}"
                )
                return
            c, s = (_column(graph, tape, table, columns) for table in rows if table is not None)
            if transpose is not None:
                x = _transposed(tape, x, transpose)
            _replace(tape, transpose or add, x, c, s)
            report.fired += 1
            return


def _rotated_half(value: ir.Value | None) -> ir.Value | None:
    """The x of Concat(-x2, x1), for the halves x1 and x2 of its last axis."""
    concat = producer(value, "Concat")
    if concat is None or concat.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    if len(concat.inputs) != 2:
        return None
    negated = producer(concat.inputs[0], "Neg")
    second = producer(negated.inputs[0], "Slice") if negated is not None else None
    first = producer(concat.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    width = x.shape[-1] if x is not None and x.shape is not None else None
    if not isinstance(width, int) or width % 2:
        return None
    spans = [_span(node, width) for node in (first, second)]
    return x if spans == [(0, width // 2), (width // 2, width)] else None


def _span(node: ir.Node, width: int) -> tuple[int, int] | None:
    """From where to where a Slice of the last axis goes."""
    starts, ends, axes, steps = (ints(value) for value in (*node.inputs[1:], None, None)[:4])
    rank = len(node.outputs[0].shape or ())
    if starts is None or ends is None or axes not in ([-1], [rank - 1]) or steps not in (None, [1]):
        return None
    start, end = starts[0], min(ends[0], width)
    return start + width * (start < 0), end + width * (end < 0)


def _heads_first(add: ir.Node) -> ir.Node | None:
    """The one reader of a rotation, if it makes [B, H, S, D] of [B, S, H, D]."""
    users = [user for user, _ in add.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Transpose":
        return None
    return users[0] if list(users[0].attributes.get_ints("perm", ())) == [0, 2, 1, 3] else None


def _transposed(tape: ir.tape.Tape, x: ir.Value, like: ir.Node) -> ir.Value:
    """What a Transpose of the rotated x makes, of x itself."""
    made = tape.op("Transpose", [x], {"perm": [0, 2, 1, 3]}, metadata_props=like.metadata_props)
    made.shape, made.type = like.outputs[0].shape, x.type
    return made


def _half_rows(value: ir.Value | None, axis: int) -> ir.Value | None:
    """The [B, S, D / 2] that a table [B, S, D], unsqueezed at an axis, repeats."""
    unsqueeze = producer(value, "Unsqueeze")
    if unsqueeze is None or ints(unsqueeze.inputs[1]) != [axis]:
        return None
    concat = producer(unsqueeze.inputs[0], "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    if concat.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    return concat.inputs[0]


def _column(
    graph: ir.Graph, tape: ir.tape.Tape, rows: ir.Value, columns: dict[ir.Value, ir.Value]
) -> ir.Value:
    """Rows [B, S, D / 2] as [B, 1, S, D / 2]; made once."""
    if rows not in columns:
        cast = producer(rows, "Cast")  # case 2
        source = rows if cast is None or cast.inputs[0] is None else cast.inputs[0]
        made = rows.producer()
        scope = {} if made is None else dict(made.metadata_props)
        axis = Builder(graph).int64([1], "axis_1")
        column = tape.op("Unsqueeze", [source, axis], metadata_props=scope)
        shape = rows.shape
        if shape is not None:
            column.shape = ir.Shape([shape[0], 1, *list(shape)[1:]])
        column.type = source.type
        if source is not rows and rows.dtype is not None:
            rounded = tape.op("Cast", [column], {"to": int(rows.dtype)}, metadata_props=scope)
            rounded.shape, rounded.type = column.shape, rows.type
            column = rounded
        columns[rows] = column
    return columns[rows]


def _replace(tape: ir.tape.Tape, add: ir.Node, x: ir.Value, c: ir.Value, s: ir.Value) -> None:
    assert x.shape is not None
    scope = dict(add.metadata_props)
    half = ir.Shape([*list(x.shape)[:-1], int(x.shape[-1]) // 2])  # type: ignore[arg-type]
    first, second = tape.op_multi_out(
        "Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2, metadata_props=scope
    )

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        made = tape.op(op_type, list(inputs), metadata_props=scope)
        made.shape, made.type = half, x.type
        return made

    for value in (first, second):
        value.shape, value.type = half, x.type
    left = op("Sub", op("Mul", first, c), op("Mul", second, s))
    right = op("Add", op("Mul", second, c), op("Mul", first, s))
    rotated = tape.op("Concat", [left, right], {"axis": -1}, metadata_props=scope)
    rotated.shape, rotated.type = x.shape, x.type
    old = add.outputs[0]
    rotated.name, old.name = old.name, None
    old.replace_all_uses_with(rotated, replace_graph_outputs=True)
