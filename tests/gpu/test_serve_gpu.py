"""The engine of `serve` on a GPU: many requests give what each gives alone."""

import queue

import numpy as np
import pytest
import torch  # noqa: F401  # before ONNX Runtime: it brings the CUDA libraries
from models_zoo import Zoo

from cla_export.engines import gpu_graph
from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from cla_export.sampling import SamplingParams
from cla_export.serve.engine import Engine
from cla_export.serve.requests import Output, Request

pytestmark = pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
VOCAB, CAPACITY, CHUNK = 97, 64, 8
SLOTS = 12


def request(seed: int) -> Request:
    random = np.random.default_rng(seed)
    shared = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)[: int(random.choice([0, 0, 8, 10]))]
    prompt = (*shared, *random.integers(3, VOCAB, int(random.integers(1, 20))).tolist())
    ways = (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9, seed=seed),
        SamplingParams(temperature=1.0, top_k=5, presence_penalty=0.5, seed=seed),
    )
    return Request(
        prompt, int(random.integers(1, 24)), ways[seed % 3], logprobs=2 if seed % 5 == 0 else None
    )


class Run:
    """An engine on a GPU, and what came of requests."""

    def __init__(self, executor: OnnxRuntimeCudaExecutor) -> None:
        self._arrived: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        self.engine = Engine(
            executor,
            lambda outputs: [self._arrived.put(output) for output in outputs] and None,
            chunk=CHUNK,
        )
        self.engine.start()

    def answers(self, requests: list[Request], cancelled: int = 0) -> list[Output]:
        """The last output of each; the first so many are cancelled, sooner or later."""
        numbers = self.engine.submit(requests)
        ended: dict[int, Output] = {}
        left = list(numbers[:cancelled])
        while len(ended) < len(numbers):
            number, output = self._arrived.get(timeout=60)
            if output.last:
                ended[number] = output
            if left:
                self.engine.cancel([left.pop()])
        return [ended[number] for number in numbers]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_requests_give_what_they_give_alone(zoo: Zoo, dtype: str) -> None:
    """The engine's thread is another than the one that opened the executor.

    Attention adds up in an order that depends on the batch, and logits of 16 bits have many near
    ties: one answer in ten may differ.
    """
    bundle = zoo.bundle(
        "onnxruntime", dtype, kv_owner=(0, 0, 2, 2), num_key_value_heads=1, vocab_size=VOCAB
    )

    def opened(slots: int) -> Run:
        return Run(OnnxRuntimeCudaExecutor(bundle, capacity=CAPACITY, slots=slots))

    asked = [request(seed) for seed in range(60)]
    together, one = opened(SLOTS), opened(1)
    mixed = together.answers(asked, cancelled=6)
    same = []
    for index, (wanted, output) in enumerate(zip(asked, mixed, strict=True)):
        (alone,) = one.answers([wanted])
        assert alone.failure is None
        assert len(alone.tokens) == wanted.max_tokens
        assert len(alone.logprobs) == (0 if wanted.logprobs is None else wanted.max_tokens)
        if output.failure is None:
            same.append(output.tokens == alone.tokens)
        else:
            assert output.failure.kind == "cancelled" and index < 6
    together.engine.stop()
    one.engine.stop()
    assert len(same) >= 54
    assert np.mean(same) >= 0.9, f"{sum(same)} of {len(same)}"
