"""What passes must not fire on, or must refuse: small graphs written by hand."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from cla_export.errors import GraphError
from cla_export.graph_text import from_text
from cla_export.rewrite.classify_masks import classify_masks, window_of
from cla_export.rewrite.fuse_rotary import fuse_rotary
from cla_export.rewrite.keep_last_logits import keep_last_logits
from cla_export.rewrite.strip_repeat_kv import strip_repeat_kv
from cla_export.rewrite.values import attention_nodes

ATTENTION = """<ir_version: 10, opset_import: ["" : 23]>
masked (
  int64[batch,sequence] input_ids,
  float[batch,2,sequence,4] q,
  float[batch,2,sequence,4] k,
  float[batch,2,sequence,4] v
) => (
  float[batch,2,sequence,4] y
)
<
  int64 zero = {0},
  int64 one = {1},
  int64 pad = {5},
  int64 window = {WINDOW},
  int64[1] axis_0 = {0},
  int64[1] axis_1 = {1}
>
{
  shape = Shape <end = 2, start = 1> (input_ids)
  length = Squeeze (shape)
  steps = Range (zero, length, one)
  row = Unsqueeze (steps, axis_1)
  column = Unsqueeze (steps, axis_0)
  distance = Sub (row, column)
  causal = GreaterOrEqual (distance, zero)
MASK
  y = Attention (q, k, v, mask)
}
"""


def masked(lines: str, window: int = 7) -> ir.Model:
    return from_text(ATTENTION.replace("MASK", lines).replace("WINDOW", str(window)))


def test_a_mask_that_reads_the_tokens_is_refused():
    model = masked(
        """  padding = Equal (input_ids, pad)
  keep = Not (padding)
  keys = Unsqueeze (keep, axis_1)
  mask = And (causal, keys)"""
    )
    with pytest.raises(GraphError, match="depends on the tokens of input_ids"):
        classify_masks(model)


@pytest.mark.parametrize("window", [7, 300, 2048, 5000, 100_000])
def test_a_window_is_found_whatever_its_size(window):
    model = masked("  near = Less (distance, window)\n  mask = And (causal, near)", window)
    classify_masks(model)
    assert window_of(attention_nodes(model.graph)[0]) == window


@pytest.mark.parametrize("window", [7, 5000])
def test_a_window_that_excludes_itself_differently(window):
    model = masked("  near = LessOrEqual (distance, window)\n  mask = And (causal, near)", window)
    classify_masks(model)
    assert window_of(attention_nodes(model.graph)[0]) == window + 1


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ("  mask = Not (causal)", "neither causal nor a sliding window"),
        ("  mask = Less (distance, window)", "neither causal nor a sliding window"),
        ("  far = Greater (distance, window)\n  mask = And (causal, far)", "neither"),
        ("  mask = Cast <to = 1> (distance)", "other than 0 and minus infinity"),
    ],
)
def test_other_masks_are_refused_with_the_node(lines, word):
    with pytest.raises(GraphError, match=word) as caught:
        classify_masks(masked(lines))
    assert "Attention node" in str(caught.value)


ROTARY = """<ir_version: 10, opset_import: ["" : 23]>
rotary (
  float[batch,2,sequence,4] x,
  float[ROWS] cos_rows,
  float[ROWS] sin_rows
) => (
  float[batch,2,sequence,4] y
)
<
  int64[1] axis_1 = {1}
>
{
  cos = Unsqueeze (cos_rows, axis_1)
  sin = Unsqueeze (sin_rows, axis_1)
  SPLIT
  left_1 = Mul (first, cos)
  left_2 = Mul (second, sin)
  left = Sub (left_1, left_2)
  right_1 = Mul (second, cos)
  right_2 = Mul (first, sin)
  right = Add (right_1, right_2)
  y = Concat <axis = -1> (left, right)
}
"""
HALVES = (
    "first, second = Split <axis = -1, num_outputs = 2> (x)"
    "  #: float[batch,2,sequence,2], float[batch,2,sequence,2]"
)
BY_HEADS = (
    "first, second = Split <axis = 1, num_outputs = 2> (x)"
    "  #: float[batch,1,sequence,4], float[batch,1,sequence,4]"
)


def rotary(rows: str, split: str) -> ir.Model:
    return from_text(ROTARY.replace("ROWS", rows).replace("SPLIT", split))


def test_rotary_on_halves_is_fused():
    model = rotary("batch,sequence,2", HALVES)
    assert fuse_rotary(model).fired == 1


@pytest.mark.parametrize(
    ("rows", "split", "reason"),
    [
        ("1,sequence,2", HALVES, "cos is not [B, S, D/2]"),
        ("batch,sequence,2", BY_HEADS, "not split into halves"),
    ],
)
def test_what_only_looks_like_rotary_is_left_alone(rows, split, reason):
    model = rotary(rows, split)
    report = fuse_rotary(model)
    assert report.fired == 0
    assert any(reason in skip.reason for skip in report.skips)
    assert all(node.op_type != "RotaryEmbedding" for node in model.graph)


TWO_HEADS = """<ir_version: 11, opset_import: ["" : 24]>
two_heads (
  int64[batch,sequence] input_ids,
  int64[batch] write_indices,
  int64[batch] kv_lengths
) => (
  float[batch,sequence,6] logits
)
<
  float[6,4] embed = ["location": "weights"],
  float[4,6] head = ["location": "weights"],
  float[4,6] other = ["location": "weights"]
>
{
  hidden = Gather (embed, input_ids)  #: float[batch,sequence,4]
  one = MatMul (hidden, head)  #: float[batch,sequence,6]
  two = MatMul (hidden, other)  #: float[batch,sequence,6]
  logits = Add (one, two)  #: float[batch,sequence,6]
}
"""


def test_logits_summed_from_two_products_are_gathered_whole():
    model = from_text(TWO_HEADS)
    generator = np.random.default_rng(0)
    for name, shape in (("embed", (6, 4)), ("head", (4, 6)), ("other", (4, 6))):
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    before = ReferenceEvaluator(ir.to_proto(model))
    report = keep_last_logits(model)
    assert report.fired == 0
    assert "not a MatMul" in report.skips[0].reason
    feeds = {
        "input_ids": generator.integers(0, 6, (2, 5)),
        "write_indices": np.array([3, 0]),
        "kv_lengths": np.array([8, 2]),  # the second row holds two tokens of five
    }
    (every,) = before.run(None, feeds)
    after = ReferenceEvaluator(ir.to_proto(model))
    (kept,) = after.run(None, {**feeds, "logits_to_keep": np.array(1)})
    np.testing.assert_allclose(kept, np.stack([every[0, 4:5], every[1, 1:2]]), rtol=1e-6)
    (whole,) = after.run(None, feeds)
    np.testing.assert_allclose(whole, every, rtol=1e-6)


REPEATED = """<ir_version: 10, opset_import: ["" : 23]>
repeated (
  float[batch,4,sequence,4] q,
  float[batch,2,sequence,4] k,
  float[batch,2,sequence,4] v,
  int64[5] expanded,
  int64[4] merged
) => (
  float[batch,4,sequence,4] y
)
<
  int64[1] axis_2 = {2}
>
{
  k_1 = Unsqueeze (k, axis_2)  #: float[batch,2,1,sequence,4]
  k_2 = Expand (k_1, expanded)  #: float[batch,2,REPEATS,sequence,4]
  k_3 = Reshape (k_2, merged)  #: float[batch,4,sequence,4]
  v_1 = Unsqueeze (v, axis_2)  #: float[batch,2,1,sequence,4]
  v_2 = Expand (v_1, expanded)  #: float[batch,2,REPEATS,sequence,4]
  v_3 = Reshape (v_2, merged)  #: float[batch,4,sequence,4]
  y = Attention <is_causal = 1> (q, k_3, v_3)
}
"""


@pytest.mark.parametrize(("repeats", "fired"), [(2, 1), (4, 0)])
def test_repeated_heads_are_stripped_only_where_they_are_merged(repeats, fired):
    model = from_text(REPEATED.replace("REPEATS", str(repeats)))
    report = strip_repeat_kv(model)
    assert report.fired == fired
    assert fired or "does not merge heads and repeats" in report.skips[0].reason
