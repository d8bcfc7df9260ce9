"""ONNX Runtime's CUDA provider: parity, captured steps, tokens chosen on the device.

Both graphs for GPUs, ours and the stock one. Skipped where there is no GPU or no onnxruntime-gpu.
"""

import numpy as np
import pytest
import torch  # noqa: F401  # before ONNX Runtime: it brings the CUDA libraries
from models_zoo import MIXED, Zoo, stateless_logits, tokens_of

from cla_export.bundle import Bundle
from cla_export.compare.gate import compare_bundle
from cla_export.engines import gpu_graph
from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from cla_export.engines.opening import open_executor
from cla_export.errors import BadInput, RunError

pytestmark = pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
PLAIN = {"kv_owner": (0, 0, 2, 2), "num_key_value_heads": 1}
MODELS = {
    "CLA2 MQA": PLAIN,
    "non-contiguous GQA": {"kv_owner": (0, 1, 0)},
    "window, biases, untied": MIXED,
    "norms": {"kv_owner": (0, 0), "qk_norm": True, "separate_kv_norm": True},
    "head dim 64": {"kv_owner": (0, 0), "head_dim": 64},
}
WIDE = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 252}  # whole blocks of 32
QUANTIZED = {  # rows of padded blocks too: 24 and 20 numbers
    "CLA2 MQA": PLAIN | WIDE,
    "window, biases, untied": MIXED | WIDE,
    "padded blocks": PLAIN,
}
DTYPES = ("fp16", "bf16")
QUANTIZE = (None, "int8", "int4")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ours", "stock"])
def stock(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "stock")


def opened(bundle: Bundle, *, stock: bool, slots: int = 5, graphs: bool = True):
    executor = OnnxRuntimeCudaExecutor(bundle, capacity=64, slots=slots, stock=stock, graphs=graphs)
    expected = bundle.cuda_graph if stock else bundle.cuda_plugin_graph
    assert executor.graph == expected
    return executor


@pytest.mark.parametrize("model", MODELS)
def test_parity(zoo: Zoo, model: str, dtype: str, stock: bool) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, **MODELS[model])
    report = compare_bundle(bundle, executor=opened(bundle, stock=stock))
    failed = [(r.case, r.output, r.max_error, r.tolerance) for r in report.tensors if not r.passed]
    assert report.passed, (report.faults, failed)


@pytest.mark.parametrize("quantize", QUANTIZE[1:])
@pytest.mark.parametrize("model", QUANTIZED)
def test_parity_of_quantised_weights(
    zoo: Zoo, model: str, quantize: str, dtype: str, stock: bool
) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, quantize, **QUANTIZED[model])
    report = compare_bundle(bundle, executor=opened(bundle, stock=stock))
    failed = [(r.case, r.output, r.max_error, r.tolerance) for r in report.tensors if not r.passed]
    assert report.passed, (report.faults, failed)


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_captured_steps_give_what_plain_ones_do(
    zoo: Zoo, dtype: str, stock: bool, quantize: str | None
) -> None:
    """Rows of different lengths, many steps: replays read lengths that capture never saw."""
    model = PLAIN | WIDE if quantize else PLAIN
    bundle = zoo.bundle("onnxruntime", dtype, quantize, **model)
    made = []
    for graphs in (True, False):
        executor = opened(bundle, stock=stock, graphs=graphs, slots=3)
        for slot in range(3):
            executor.prefill(slot, [1 + slot, 2, 3, 4][: 2 + slot], 0)
        made.append(
            [
                executor.decode(range(3), [5, 6, 7], [2 + step, 3 + step, 4 + step])
                for step in range(40)
            ]
        )
    for captured, plain in zip(*made, strict=True):
        assert np.array_equal(captured, plain)


def test_greedy_tokens_are_those_of_the_logits(zoo: Zoo, dtype: str, stock: bool) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, **PLAIN)
    executor = opened(bundle, stock=stock, slots=3)

    def prompts() -> None:
        for slot in range(3):
            executor.prefill(slot, [1 + slot, 2, 3], 0)

    prompts()
    tokens, lengths = [5, 6, 7], [3, 3, 3]
    one_by_one = []
    for step in range(10):
        logits = executor.decode(range(3), tokens, [n + step for n in lengths])
        tokens = logits.argmax(-1).tolist()
        one_by_one.append(tokens)
    prompts()
    together = executor.decode_greedy(range(3), [5, 6, 7], lengths, 10)
    assert together.T.tolist() == one_by_one


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_rows_of_a_wide_batch(zoo: Zoo, dtype: str, quantize: str | None) -> None:
    """64 rows, 33, 8: kernels differ, logits agree with those of a row alone."""
    model = PLAIN | WIDE if quantize else PLAIN
    bundle = zoo.bundle("onnxruntime", dtype, quantize, **model)
    executor = opened(bundle, stock=False, slots=66)
    for slot in range(66):
        executor.prefill(slot, [1 + slot % 7, 2, 3], 0)
    alone = np.stack([executor.decode([slot], [5 + slot % 3], [3])[0] for slot in range(66)])
    for rows in (66, 64, 33, 20, 12, 8, 5):
        together = executor.decode(range(rows), [5 + i % 3 for i in range(rows)], [3] * rows)
        off = np.abs(together - alone[:rows]).max() / np.abs(alone).max()
        assert off < (2e-2 if dtype == "bf16" else 3e-3), rows


def test_prompts_of_different_lengths(zoo: Zoo, dtype: str, stock: bool) -> None:
    """Read together they give what each gives alone, and so does what follows them."""
    bundle = zoo.bundle("onnxruntime", dtype, **PLAIN)
    executor = opened(bundle, stock=stock, slots=9)
    assert executor.reads_rows_at_once == (not stock)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 61, n).tolist() for n in (7, 1, 30, 12, 2, 19, 30, 3)]
    together = executor.prefill_rows(1, prompts)
    after = executor.decode(range(1, 9), [5] * 8, [len(p) for p in prompts])
    alone = OnnxRuntimeCudaExecutor(bundle, capacity=64, slots=1, stock=stock)
    for row, prompt in enumerate(prompts):
        for made, expected in (
            (together[row], alone.prefill(0, prompt, 0)[0]),
            (after[row], alone.decode([0], [5], [len(prompt)])[0]),
        ):
            off = np.abs(made - expected).max() / np.abs(expected).max()
            assert off < (2e-2 if dtype == "bf16" else 3e-3), (row, off)


def test_long_prompts(zoo: Zoo, dtype: str) -> None:
    """On warp groups, where there are any: as near to PyTorch in float32 as the stock graph is."""
    shape = {**PLAIN, "num_attention_heads": 16, "head_dim": 64, "max_position_embeddings": 1400}
    bundle = zoo.bundle("onnxruntime", dtype, **shape)
    tokens = tokens_of(1110)
    expected = stateless_logits(zoo.model(**shape), [*tokens, 5])
    errors = []
    for stock in (False, True):
        executor = OnnxRuntimeCudaExecutor(bundle, capacity=1400, slots=2, stock=stock)
        parts = [executor.prefill(1, tokens[:700], 0, keep=700)]
        parts.append(executor.prefill(1, tokens[700:], 700, keep=410))
        again = executor.prefill(1, tokens[700:], 700, keep=410)  # launched as it was noted
        assert np.array_equal(again, parts[1])
        made = np.concatenate([*parts, executor.decode([1], [5], [1110])])
        errors.append(np.sqrt(np.mean(np.square(made - expected))) / expected.std())
    ours, theirs = errors
    assert ours < max(1.5 * theirs, 1e-3), errors


def test_a_step_over_other_slots(zoo: Zoo, stock: bool) -> None:
    bundle = zoo.bundle("onnxruntime", "fp16", **PLAIN)
    executor = opened(bundle, stock=stock, slots=4)
    for slot in range(4):
        executor.prefill(slot, [9, 8, 7], 0)
    first = executor.decode([0, 1], [3, 4], [3, 3])
    other = executor.decode([2, 3], [3, 4], [3, 3])
    assert np.array_equal(first, other)


def test_wrong_steps_are_refused(zoo: Zoo, stock: bool) -> None:
    executor = opened(zoo.bundle("onnxruntime", "fp16", **PLAIN), stock=stock, slots=2)
    with pytest.raises(BadInput, match="the capacity is 64"):
        executor.decode_greedy([0], [1], [60], 5)
    with pytest.raises(BadInput, match="consecutive"):
        executor.decode_greedy([1, 0], [1, 2], [3, 3])
    with pytest.raises((BadInput, RunError)):
        executor.decode([0], [1], [64])


def test_device_bytes(zoo: Zoo, stock: bool) -> None:
    executor = opened(zoo.bundle("onnxruntime", "fp16", **PLAIN), stock=stock, slots=2)
    assert executor.device_bytes["caches"] == 2 * 2 * 2 * 64 * 16 * 2


def test_what_the_command_line_opens(zoo: Zoo, dtype: str) -> None:
    """Parity and generation take the GPU by themselves where a bundle has a graph for it."""
    bundle = zoo.bundle("onnxruntime", dtype, **PLAIN)
    assert isinstance(open_executor(bundle, capacity=16), OnnxRuntimeCudaExecutor)
    report = compare_bundle(bundle)
    assert report.passed
    assert any("an engine shows no values inside" in note for note in report.notes)
