"""Random mixes of requests, through HTTP: token for token what each gives alone."""

import asyncio
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from running import ServerProcess

from cla_export.bundle import open_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.sampling import SamplingParams
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Scheduler
from cla_export.serve.sequence import Sequence

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from soak import soak


def test_forty_requests_give_what_they_give_alone(demo_bundle):
    options = ("--slots", 5, "--chunk", 16, "--threads", 1, "--max-queued-requests", 30)
    with ServerProcess(demo_bundle, *options) as server:
        found = asyncio.run(soak(server.url, 40, seed=3, rate=200))
        assert found.faults == []
        assert found.same == found.requests >= 25
        assert found.cancelled > 0
        assert found.cached > 0
        assert "Traceback" not in server.stderr


@pytest.fixture(scope="module")
def executor(demo_bundle):
    bundle = open_bundle(demo_bundle, verify=False)
    return OnnxRuntimeExecutor(bundle, capacity=256, slots=3, threads=1)


class Recorded(Scheduler):
    """Keeps the logits that the first token of every sequence was chosen by."""

    def _choose(self, rows, logits):
        self.first = getattr(self, "first", {})
        for sequence, row in zip(rows, logits, strict=True):
            self.first.setdefault(sequence.number, row.copy())
        return super()._choose(rows, logits)


def run(scheduler, *requests):
    numbers = range(len(requests))
    for number, request in zip(numbers, requests, strict=True):
        scheduler.waiting.append(Sequence(number, request, frozenset(), None))
    outputs = []
    while scheduler.busy:
        outputs += chain.from_iterable(scheduler.tick())
    return dict(outputs)


def test_a_reused_prefix_gives_the_same_bits(executor):
    """Chunks begin at the same places whatever was reused, so the same calls compute a cache."""
    text = tuple(np.random.default_rng(0).integers(3, 2048, 150).tolist())
    request = Request(text, 8, SamplingParams(temperature=1.0, seed=4))
    cold = Recorded(executor, lambda: 0.0, chunk=32)
    first = run(cold, request)[0]
    busy = (Request(text[:70], 40), Request(text[:100], 40))
    for others, cached in (((), 128), (busy, 96)):
        warm = Recorded(executor, lambda: 0.0, chunk=32)
        run(warm, Request(text[:140], 3))  # reused, or what the second busy one has copied
        warm.first.clear()
        last = run(warm, *others, request)[len(others)]
        assert last.finish.cached_tokens == cached
        assert (warm.first[len(others)] == cold.first[0]).all()
        assert last.tokens == first.tokens
