"""Tokens chosen on a GPU: by the definition, and as a CPU chooses by the same random bits."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch  # noqa: F401  # before ONNX Runtime: it brings the CUDA libraries
from models_zoo import Zoo

from cla_export.draw import Scratch
from cla_export.engines import gpu_graph
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.device_chooser import DeviceChooser
from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from cla_export.errors import RunError
from cla_export.sampling import Sampler, SamplingParams, choose, pick_by

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
VOCABULARIES = (3, 40, 2048, 50257, 151936)
ROWS = 48
WAYS = {
    "temperature": SamplingParams(temperature=0.7),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9),
    "a narrow top_p": SamplingParams(temperature=1.3, top_p=0.2),
    "top_k 1": SamplingParams(temperature=1.0, top_k=1),
    "top_k 50": SamplingParams(temperature=0.9, top_k=50),
    "top_k 1500": SamplingParams(temperature=2.0, top_k=1500),
    "min_p": SamplingParams(temperature=1.0, min_p=0.05),
    "all": SamplingParams(temperature=1.0, top_k=40, min_p=0.01, top_p=0.8),
    "penalties": SamplingParams(
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias=((1, 5.0), (2, -100.0)),
    ),
    "cold": SamplingParams(temperature=1e-30),
}
# Two tokens finish a race within the rounding of an exponential or a sum in about one of 100,000.
AGREE = 0.99


def chooser_of(memory: CudaMemory, dtype: str, vocab: int) -> DeviceChooser:
    return DeviceChooser(memory, dtype, vocab, ROWS)


def chosen(memory: CudaMemory, dtype: str, logits: np.ndarray, choices: list) -> list[int | None]:
    chooser = chooser_of(memory, dtype, logits.shape[1])
    at = memory.allocate(logits.nbytes)
    memory.upload(at, logits)
    chooser.prepare(choices)
    chooser.choose(at, len(logits))
    return chooser.tokens()


def samplers(params: SamplingParams) -> list[Sampler]:
    """One for each row, which has seen three tokens of prompt, and chosen two of its own."""
    made = [
        Sampler(params, prompt=[0, 1, 1], choice=row, barred=[0], barred_for=2 + row % 2)
        for row in range(ROWS)
    ]
    for sampler in made:
        sampler.take(1)
        sampler.take(2)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [0.5, 4.0])
def test_tokens_are_those_of_a_cpu(memory: CudaMemory, dtype: str, way: str, width: float) -> None:
    same = total = 0
    for vocab in VOCABULARIES:
        random = np.random.default_rng(vocab)
        logits = (random.standard_normal((ROWS, vocab)) * width).astype(DTYPES[dtype])
        choices = [sampler.next_choice() for sampler in samplers(WAYS[way])]
        found = chosen(memory, dtype, logits, choices)
        wide = logits.astype(np.float32)
        scratch = Scratch(vocab)
        expected = [
            pick_by(choice, row, scratch) for choice, row in zip(choices, wide, strict=True)
        ]
        same += sum(a == b for a, b in zip(found, expected, strict=True))
        total += ROWS
        wide[1::2, 0] = -np.inf  # is barred there
        for row, token in enumerate(found):
            assert token is not None
            if way.startswith("top_k"):
                k = WAYS[way].top_k
                assert k >= vocab or wide[row, token] >= np.sort(wide[row])[-k]
            if way == "min_p":
                assert wide[row, token] - wide[row].max() >= math.log(0.05) - 1e-4
    assert same >= AGREE * total, f"{same} of {total}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest(memory: CudaMemory, dtype: str) -> None:
    """Ties go to the first; penalties and barred tokens count."""
    for vocab in VOCABULARIES:
        random = np.random.default_rng(vocab)
        logits = (random.standard_normal((ROWS, vocab)) * 2).astype(DTYPES[dtype])
        logits[: ROWS // 2] = np.round(logits[: ROWS // 2].astype(np.float32))  # many ties
        for way in (SamplingParams(), SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)):
            rows = samplers(way)
            choices = [sampler.next_choice() for sampler in rows]
            found = chosen(memory, dtype, logits, choices)
            expected = [
                pick_by(choice, row.astype(np.float32), Scratch(vocab))
                for choice, row in zip(choices, logits, strict=True)
            ]
            assert found == expected


def test_equal_logits_of_which_most_are_candidates(memory: CudaMemory) -> None:
    """More tokens reach the k-th largest than there is room to note."""
    logits = np.zeros((2, 151936), np.float16)
    logits[1, ::7] = 1
    choices = [
        Sampler(SamplingParams(temperature=1.0, top_k=20), choice=row).next_choice()
        for row in (0, 1)
    ]
    first, second = chosen(memory, "float16", logits, choices)
    assert first is not None and second is not None
    assert second % 7 == 0  # ties at the border stay, all of them


def test_rows_that_are_not_numbers(memory: CudaMemory) -> None:
    logits = np.random.default_rng(0).standard_normal((6, 5000)).astype(np.float16)
    logits[1, 4999], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, :4000] = -np.inf  # is a row of numbers
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, top_k=30)):
        choices = [Sampler(params, choice=row).next_choice() for row in range(6)]
        found = chosen(memory, "float16", logits, choices)
        assert [token is None for token in found] == [False, True, True, True, False, False]
        assert found[4] is not None and found[4] >= 4000


def test_a_row_is_drawn_alike_in_any_company(memory: CudaMemory) -> None:
    logits = np.random.default_rng(1).standard_normal((ROWS, 32000)).astype(np.float16)
    choices = [
        Sampler(list(WAYS.values())[row % len(WAYS)], [3], choice=row).next_choice()
        for row in range(ROWS)
    ]
    together = chosen(memory, "float16", logits, choices)
    alone = [chosen(memory, "float16", logits[i : i + 1], [choices[i]])[0] for i in range(ROWS)]
    assert together == alone


def test_a_vocabulary_that_is_too_large(memory: CudaMemory) -> None:
    with pytest.raises(RunError, match="at most 1,048,576"):
        chooser_of(memory, "float16", 1 << 21)


@pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
def test_slots_behind_the_rows_are_left_alone(zoo: Zoo) -> None:
    """A step of nine rows is captured as one of twelve."""
    bundle = zoo.bundle("onnxruntime", "fp16", kv_owner=(0, 0, 2, 2), num_key_value_heads=1)
    executor = OnnxRuntimeCudaExecutor(bundle, capacity=64, slots=12)
    for slot in range(12):
        executor.prefill(slot, list(range(1 + slot, 60)), 0)
    before = [executor.read(group, slot)[0].copy() for group in (0, 1) for slot in (9, 10, 11)]
    arguments = range(9), [5] * 9, [59 - slot for slot in range(9)]
    executor.begin_decode(*arguments, [Sampler().next_choice()] * 9)
    chosen = executor.end_decode()
    after = [executor.read(group, slot)[0] for group in (0, 1) for slot in (9, 10, 11)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    logits = np.stack([executor.logits_of(row) for row in range(9)])
    assert chosen == logits.argmax(1).tolist()
    exact = executor.decode(*arguments)
    assert np.abs(exact - logits).max() < 3e-3 * np.abs(exact).max()


@pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stock", [False, True])
def test_an_executor_chooses_by_its_own_logits(zoo: Zoo, dtype: str, stock: bool) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, kv_owner=(0, 0, 2, 2), num_key_value_heads=1)
    executor = OnnxRuntimeCudaExecutor(bundle, capacity=64, slots=3, stock=stock)
    for slot in range(3):
        executor.prefill(slot, [1 + slot, 2, 3], 0)
    for step in range(12):
        arguments = range(3), [5, 6, 7], [3 + step] * 3
        logits = executor.decode(*arguments)
        params = [SamplingParams(), WAYS["all"], WAYS["penalties"]]
        first, second = ([Sampler(way, [1], choice=step) for way in params] for _ in range(2))
        executor.begin_decode(*arguments, [sampler.next_choice() for sampler in first])
        assert executor.end_decode() == choose(logits, second)
        for row in range(3):
            assert np.array_equal(executor.logits_of(row), logits[row])


@pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stock", [False, True])
def test_first_tokens_while_a_step_runs(zoo: Zoo, dtype: str, stock: bool) -> None:
    """Prompts leave what the step's tokens are chosen by, and its logits, alone."""
    bundle = zoo.bundle("onnxruntime", dtype, kv_owner=(0, 0, 2, 2), num_key_value_heads=1)
    executor = OnnxRuntimeCudaExecutor(bundle, capacity=64, slots=7, stock=stock)
    for slot in range(4):
        executor.prefill(slot, [1 + slot, 2, 3], 0)
    ways = [WAYS["all"], WAYS["penalties"], SamplingParams(), WAYS["top_p"]]
    texts = [[5], [3, 4, 5, 6, 7], list(range(1, 40))]
    for step, prompts in enumerate((texts, texts[:1], texts[2:], texts)):
        arguments = range(4), [5, 6, 7, 8], [3 + step] * 4
        logits = executor.decode(*arguments)
        behind = executor.prefill_rows(4, prompts)
        stepped, read, *again = (
            [Sampler(way, [1], choice=step) for way in rows]
            for rows in (ways, ways[: len(prompts)], ways, ways[: len(prompts)])
        )
        executor.begin_decode(*arguments, [sampler.next_choice() for sampler in stepped])
        first = executor.prefill_and_choose(
            4, prompts, [0] * len(prompts), [sampler.next_choice() for sampler in read]
        )
        for row, expected in enumerate(behind):
            assert np.array_equal(executor.logits_of(row), expected)
        assert first == choose(behind, again[1])
        assert executor.end_decode() == choose(logits, again[0])
        for row, expected in enumerate(logits):
            assert np.array_equal(executor.logits_of(row), expected)
