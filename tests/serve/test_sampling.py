"""The sampler: against plain definitions, and the same whatever is beside a row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.errors import BadInput
from cla_export.kth_largest import kth_largest
from cla_export.sampling import Sampler, SamplingParams, choose
from cla_export.serve.logprobs import logprob_of


def row(seed, vocab=40):
    return (np.random.default_rng(seed).standard_normal(vocab) * 2).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def allowed(logits, params):
    """Probabilities of tokens by the definition, in float64."""
    scores = logits.astype(np.float64)
    if params.top_k:
        scores[scores < np.sort(scores)[-min(params.top_k, len(scores))]] = -np.inf
    probabilities = softmax(scores / params.temperature)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= params.top_p]] = 0
    return probabilities / probabilities.sum()


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.37, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 39, 40, 100]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**64),
)


@settings(deadline=None)
@given(params, st.integers(0, 1000), st.sampled_from([40, 700]))
def test_only_allowed_tokens_are_drawn(given_params, seed, vocab):
    logits = row(seed, vocab)
    possible = allowed(logits, given_params)
    sampler = Sampler(given_params)
    for _ in range(20):
        assert possible[sampler.pick(logits)] > 0


@pytest.mark.parametrize(
    "given_params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.2, min_p=0.1, top_k=20, top_p=0.95),
    ],
)
def test_frequencies_are_the_probabilities(given_params):
    logits, count = row(3), 20_000
    sampler = Sampler(given_params)
    drawn = np.bincount([sampler.pick(logits) for _ in range(count)], minlength=40) / count
    possible = allowed(logits, given_params)
    spread = np.sqrt(possible * (1 - possible) / count)
    assert (np.abs(drawn - possible) <= 5 * spread).all()


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95, 1.0])
def test_frequencies_of_many_tokens(top_p):
    """More than one block of tokens, and a top_p that few or all of them reach."""
    logits, count = row(5, 1000) / 2, 10_000
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p))
    drawn = np.bincount([sampler.pick(logits) for _ in range(count)], minlength=1000)
    expected = allowed(logits, sampler.params) * count
    inside = expected > 0
    assert not drawn[~inside].any()
    chi_squared = ((drawn - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = inside.sum() - 1
    assert abs(chi_squared - freedom) < 4 * np.sqrt(2 * freedom)


def test_tokens_as_likely_as_the_last_one_stay():
    logits = np.array([2.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    for given_params in (
        SamplingParams(temperature=1.0, top_p=0.6),  # the first two would have it
        SamplingParams(temperature=1.0, top_k=2),
    ):
        sampler = Sampler(given_params)
        assert {sampler.pick(logits) for _ in range(200)} == {0, 1, 2, 3}


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=400), st.data())
def test_kth_largest(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    assert kth_largest(np.array(numbers, np.float32), k) == sorted(numbers)[-k]


@settings(deadline=None)
@given(st.lists(params, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_mates(several, seed):
    steps = [np.stack([row([seed, step, i]) for i in range(len(several))]) for step in range(4)]
    together = [Sampler(given_params) for given_params in several]
    chosen = [choose(logits, together) for logits in steps]
    for i, given_params in enumerate(several):
        alone = Sampler(given_params)
        assert [step[i] for step in chosen] == [alone.pick(logits[i]) for logits in steps]


def test_seeds_and_choices_differ_and_repeat():
    def drawn(seed, choice=0):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), choice=choice)
        return [sampler.pick(row(i)) for i in range(20)]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed, choice)) for seed in (1, 2) for choice in (0, 1)}) == 4


def test_greedy_takes_the_likeliest():
    rows = np.stack([row(i) for i in range(5)])
    assert choose(rows, [Sampler() for _ in rows]) == rows.argmax(1).tolist()
    for temperature in (1e-6, 1e-50):
        nearly = SamplingParams(temperature=temperature, top_p=0.9, seed=3)
        assert choose(rows, [Sampler(nearly) for _ in rows]) == rows.argmax(1).tolist()


def test_logit_bias_and_barred_tokens():
    logits = row(0)
    likeliest = int(logits.argmax())
    assert Sampler(SamplingParams(logit_bias=((7, 100.0),))).pick(logits) == 7
    assert Sampler(SamplingParams(logit_bias=((likeliest, -100.0),))).pick(logits) != likeliest
    sampler = Sampler(barred=[likeliest], barred_for=2)
    assert [sampler.pick(logits) == likeliest for _ in range(4)] == [False, False, True, True]


def test_penalties_by_their_formulas():
    logits = np.array([2.0, 1.5, -1.0, -1.2, 0.9], np.float32)
    once = Sampler(SamplingParams(presence_penalty=1.0))
    assert [once.pick(logits) for _ in range(4)] == [0, 1, 0, 0]  # 1.0 and 0.5 remain
    each = Sampler(SamplingParams(frequency_penalty=0.7))
    assert [each.pick(logits) for _ in range(5)] == [0, 1, 0, 4, 1]
    negative = np.array([-1.0, -1.2], np.float32)
    repeated = Sampler(SamplingParams(repetition_penalty=1.5), prompt=[0])
    assert repeated.pick(negative) == 1  # -1.5 against -1.2
    assert Sampler(SamplingParams(repetition_penalty=3.0), prompt=[0, 1]).pick(logits) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((3, 101.0),)),
        ("logit_bias", ((-3, 1.0),)),
    ],
)
def test_wrong_parameters_are_named(field, value):
    with pytest.raises(BadInput, match=field):
        SamplingParams(**{field: value})


@given(st.integers(0, 1000), st.integers(0, 6))
def test_logprobs_are_those_of_the_softmax(seed, top):
    logits = row(seed)
    found = logprob_of(logits, 5, top)
    log = np.log(softmax(logits))
    assert found.logprob == pytest.approx(log[5], abs=1e-5)
    order = np.argsort(-logits, kind="stable")[:top]
    assert [token for token, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(log[order].tolist(), abs=1e-5)
