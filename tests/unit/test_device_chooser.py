"""What a GPU is told of how tokens are chosen. The kernel itself runs in tests/gpu."""

import math
from itertools import pairwise

import numpy as np
import pytest

from cla_export.engines.device_chooser import pack_changes, pack_params
from cla_export.plugin.compile import compile_choice
from cla_export.sampling import Sampler, SamplingParams


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_the_kernel_compiles(bf16: bool, capability: tuple[int, int]) -> None:
    assert compile_choice(bf16, capability, None).code


def test_parameters_lie_as_the_kernel_reads_them() -> None:
    """Two numbers of 8 bytes, six of 4, six integers: `Pick` in choose_tokens.cu."""
    params = SamplingParams(
        0.5, 0.9, 40, 0.25, repetition_penalty=4.0, presence_penalty=2.0, frequency_penalty=3.0
    )
    packed = pack_params([SamplingParams(), params])
    packed["key"] = 0, 2**64 - 1
    greedy, drawn = packed.tobytes()[:64], packed.tobytes()[64:]
    assert len(drawn) == 64
    assert np.frombuffer(greedy, np.float32, 1, 16)[0] == 0
    assert np.frombuffer(drawn, np.float64, 1)[0] == 0.9
    assert np.frombuffer(drawn, np.uint64, 1, 8)[0] == 2**64 - 1
    floats = np.frombuffer(drawn, np.float32, 6, 16)
    assert floats.tolist() == [0.5, np.float32(math.log(0.25)), 4.0, 0.25, 2.0, 3.0]
    assert np.frombuffer(drawn, np.int32, 6, 40).tolist() == [40, 0, 0, 0, 0, 0]


def test_a_temperature_that_float32_does_not_have_is_not_greedy() -> None:
    (packed,) = pack_params([SamplingParams(temperature=1e-60)])
    assert packed["temperature"] > 0
    (open_,) = pack_params([SamplingParams(temperature=1.0)])
    assert open_["lowest"] == -np.inf


def test_each_row_has_its_own_changes() -> None:
    biased = SamplingParams(repetition_penalty=2.0, logit_bias=((7, 1.0), (3, 2.0), (7, 1.0)))
    penalised = SamplingParams(presence_penalty=1.0)
    samplers = [
        Sampler(biased, [5, 5]),
        Sampler(),
        Sampler(penalised, [9], barred=[1, 2], barred_for=1),
        Sampler(barred=[4], barred_for=1),
    ]
    samplers[2].take(9)  # which also ends what is barred
    samplers[0].take(8)
    samplers[0].take(8)
    choices = [sampler.next_choice() for sampler in samplers]
    assert choices[1].changes is None
    picks = pack_params([choice.params for choice in choices])
    changes = pack_changes(picks, [choice.changes for choice in choices])
    told = []
    for pick in picks:
        places = [int(pick[name]) for name in ("biased", "seen", "barred", "end")]
        told.append([changes[a:b].tolist() for a, b in pairwise(places)])
    assert told == [
        [[(7, 2.0), (3, 2.0)], [(5, 0.0), (8, 2.0)], []],
        [[], [], []],
        [[], [(9, 1.0)], []],
        [[], [], [(4, 0.0)]],
    ]


def test_a_gpu_of_no_changes_is_told_so_again() -> None:
    picks = pack_params([SamplingParams(repetition_penalty=2.0)])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [1, 2])
    assert len(pack_changes(picks, [sampler.next_choice().changes])) == 2
    assert not len(pack_changes(picks, [None]))
    assert picks["biased"] == picks["end"]
