"""The ONNX Runtime executor for GPUs over *simulated* memory and sessions: nothing runs on a GPU.

A session runs the graph for GPUs on the CPU provider, over the memory at the addresses that were
bound. `head_dim` 10 gives standard attention, which reads several prompts at once there, as our own
operator does on a GPU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from models_zoo import Zoo, tokens_of
from simulated_tensorrt import SimulatedChooser, SimulatedMemory

from cla_export.bundle import Bundle
from cla_export.engines import onnxruntime_cuda
from cla_export.engines.cuda_session import UNCAPTURED, OnDevice
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from cla_export.errors import BadInput
from cla_export.sampling import Sampler, SamplingParams, choose

TOGETHER = {"kv_owner": (0, 0), "head_dim": 10, "sliding_window": 4}
BY_ROW = {"kv_owner": (0, 0, 2, 2)}
CAPACITY, SLOTS = 48, 5
CLOSE = 5e-2  # of logits of order 5 to 10, in float16: see test_onnxruntime_cuda.py


class SimulatedSession:
    """As `CudaSession`; `attends_itself` is said of graphs whose attention takes several rows."""

    together = True

    def __init__(
        self, graph: Path, _library: None, memory: SimulatedMemory, _dtype: str, **_: Any
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self._session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self.memory, self.attends_itself = memory, self.together
        self.calls: list[tuple[tuple[int, ...], int]] = []  # shape of tokens, number of the graph

    def bind(
        self,
        inputs: Mapping[str, OnDevice],
        outputs: Mapping[str, OnDevice],
        host: Mapping[str, np.ndarray],
        captured_as: int = UNCAPTURED,
    ) -> tuple[Any, ...]:
        return inputs, outputs, host, captured_as

    def run(self, call: tuple[Any, ...]) -> None:
        inputs, outputs, host, captured_as = call
        self.calls.append((inputs["input_ids"].shape, captured_as))
        binding = self._session.io_binding()
        for name, array in host.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for places, bind in (
            (inputs, binding.bind_ortvalue_input),
            (outputs, binding.bind_ortvalue_output),
        ):
            for name, (dtype, shape, address) in places.items():
                array = self.memory.at(address, shape, dtype)
                bind(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self._session.run_with_iobinding(binding)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "CudaMemory", lambda _device: SimulatedMemory())
    monkeypatch.setattr(onnxruntime_cuda, "CudaSession", SimulatedSession)
    monkeypatch.setattr(onnxruntime_cuda, "DeviceChooser", SimulatedChooser)
    monkeypatch.setattr(onnxruntime_cuda, "_CHUNK", 16)


@pytest.fixture(params=[True, False], ids=["together", "row by row"])
def bundle(request: pytest.FixtureRequest, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(SimulatedSession, "together", request.param)
    return zoo.bundle("onnxruntime", "fp16", **(TOGETHER if request.param else BY_ROW))


def opened(bundle: Bundle, slots: int = SLOTS) -> OnnxRuntimeCudaExecutor:
    return OnnxRuntimeCudaExecutor(bundle, capacity=CAPACITY, slots=slots, stock=True)


def test_prompts_and_steps_are_those_of_a_cpu(bundle: Bundle) -> None:
    ours = opened(bundle)
    other = OnnxRuntimeExecutor(bundle, capacity=CAPACITY, slots=SLOTS, threads=1)
    text = tokens_of(37)
    for keep in (1, 5, 37):  # of the last chunk alone, of two, of all
        got, want = (made.prefill(0, text, 0, keep) for made in (ours, other))
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= CLOSE
    got, want = (made.prefill(0, text[:3], 37, 2) for made in (ours, other))
    assert np.abs(got - want).max() <= CLOSE
    texts = [tokens_of(length, length) for length in (2, 5, 1, 20)]
    ours._session.calls.clear()
    got, want = (made.prefill_rows(1, texts) for made in (ours, other))
    assert np.abs(got - want).max() <= CLOSE
    shapes = [shape for shape, _ in ours._session.calls]
    apart = [(1, 2), (1, 5), (1, 1)]
    assert shapes == [*([(3, 5)] if ours.reads_rows_at_once else apart), (1, 16), (1, 4)]
    lengths = [40, 2, 5, 1, 20]
    for step in range(3):
        call = range(SLOTS), tokens_of(SLOTS, step), [n + step for n in lengths]
        assert np.abs(ours.decode(*call) - other.decode(*call)).max() <= CLOSE
    assert ours._session.calls[-4:] == [((SLOTS, 1), 1)] * 4, "captured by a run of its own"


def test_tokens_are_chosen_by_the_logits(bundle: Bundle) -> None:
    """Prompts between a step and its end leave what that is chosen by, and its logits, alone."""
    ours, plain = opened(bundle), opened(bundle)
    drawn = SamplingParams(temperature=0.9, top_p=0.9, presence_penalty=0.5)
    ways = [SamplingParams(), drawn, drawn]
    first, second = ([Sampler(way, choice=i) for i, way in enumerate(ways)] for _ in range(2))

    def choices(samplers: list[Sampler]) -> list:
        return [sampler.next_choice() for sampler in samplers]

    prompts = [tokens_of(length, length) for length in (3, 9)]
    tokens = ours.prefill_and_choose(0, prompts, [0, 0], choices(first[:2]))
    logits = plain.prefill_rows(0, prompts)
    assert tokens == choose(logits, second[:2])
    assert np.array_equal([ours.logits_of(row) for row in (0, 1)], logits)
    assert None not in tokens
    for sampler, token in zip(first, tokens, strict=False):
        sampler.take(token)
    for late in ([7, 8, 9], [4]):  # the second: the rest of a prompt whose start was there
        arguments = range(2), tokens, [3, 9]
        ours.begin_decode(*arguments, choices(first[:2]))
        held = 0 if len(late) > 1 else 3
        (other,) = ours.prefill_and_choose(3, [late], [held], choices(first[2:]))
        (expected,) = plain.prefill(3, late, held)
        assert np.array_equal(ours.logits_of(0), expected)
        assert [other] == choose(expected[None], second[2:])
        first[2].take(other)
        tokens, logits = ours.end_decode(), plain.decode(*arguments)
        assert tokens == choose(logits, second[:2])
        assert np.array_equal([ours.logits_of(row) for row in (0, 1)], logits)
        for sampler, token in zip(first, tokens, strict=False):
            sampler.take(token)


def test_greedy_steps_feed_each_other(bundle: Bundle) -> None:
    ours = opened(bundle)
    prompts = [tokens_of(length, length) for length in (3, 9)]
    tokens = ours.prefill_rows(0, prompts).argmax(1).tolist()
    made = ours.decode_greedy(range(2), tokens, [3, 9], 4)
    for step in range(4):
        tokens = ours.decode(range(2), tokens, [3 + step, 9 + step]).argmax(1).tolist()
        assert made[:, step].tolist() == tokens
    with pytest.raises(BadInput, match="the capacity is 48"):
        ours.decode_greedy([0], [1], [45], 4)


def test_what_is_held_is_accounted_for(bundle: Bundle) -> None:
    ours = opened(bundle)
    ours.decode([0], [1], [0])
    ours.prefill(1, tokens_of(30), 0, keep=20)
    assert ours.device_bytes["caches"] == SLOTS * CAPACITY * bundle.layout.bytes_per_token(
        "float16"
    )
    held = sum(size for size, _ in ours._memory.blocks.values())
    assert held == sum(ours.device_bytes.values())
