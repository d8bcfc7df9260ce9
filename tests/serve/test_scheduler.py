"""The scheduler over a fake executor: bookkeeping, reuse of prefixes, failures."""

import numpy as np
import pytest
from fake import VOCAB, FakeDevice, FakeExecutor, expected, logits_after
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.sampling import SamplingParams
from cla_export.serve.logprobs import logprob_of
from cla_export.serve.requests import Output, Request
from cla_export.serve.scheduler import Scheduler
from cla_export.serve.sequence import Sequence, fits

CHUNK = 4
both_kinds = pytest.mark.parametrize("kind", [FakeExecutor, FakeDevice])


class Bench:
    """A scheduler, a clock that is set by hand, and everything that came out."""

    def __init__(self, executor: FakeExecutor | None = None, chunk: int = CHUNK) -> None:
        self.executor = executor or FakeExecutor()
        self.now = 0.0
        self.scheduler = Scheduler(self.executor, lambda: self.now, chunk=chunk)
        self.outputs: dict[int, list[Output]] = {}

    def add(self, request: Request) -> int:
        number = len(self.outputs)
        assert not fits(request, self.executor.capacity, self.executor.vocab_size)
        self.outputs[number] = []
        self.scheduler.waiting.append(Sequence(number, request, frozenset(), None, self.now))
        return number

    def tick(self, *cancelled: int) -> None:
        for outputs in self.scheduler.tick(frozenset(cancelled)):
            for number, output in outputs:
                assert not self.ended(number), f"{number} was told something after its end"
                self.outputs[number].append(output)
        self.check()

    def run(self, *requests: Request) -> list[Output]:
        """The last output of each."""
        numbers = [self.add(request) for request in requests]
        while self.scheduler.busy:
            self.tick()
        return [self.outputs[number][-1] for number in numbers]

    def ended(self, number: int) -> bool:
        return any(output.last for output in self.outputs[number])

    def tokens(self, number: int) -> list[int]:
        return [token for output in self.outputs[number] for token in output.tokens]

    def check(self) -> None:
        """Every sequence is where it should be, and its slot holds what it should."""
        scheduler, pool = self.scheduler, self.executor.pool
        assert [s.slot for s in scheduler.active] == list(range(len(scheduler.active)))
        running = list(scheduler.active)
        for reading in scheduler.prefilling:
            assert reading.slot >= len(running)
            running.append(reading)
        for sequence in running:
            assert (
                pool[sequence.slot, 0, : sequence.length, 0].tolist()
                == (sequence.tokens[: sequence.length])
            )
            assert sequence.length <= len(sequence.tokens) <= self.executor.capacity + 1
        for slot, held in enumerate(scheduler._slots.held):
            assert len(held) % scheduler.chunk == 0
            assert pool[slot, 0, : len(held), 0].tolist() == held.tolist()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


requests = st.builds(
    lambda length, shared, seed, count, temperature, stream: Request(
        (*prompt(shared, 99), *prompt(length, seed)),
        count,
        SamplingParams(temperature=temperature, seed=seed),
        stream=stream,
    ),
    length=st.integers(1, 20),
    shared=st.sampled_from([0, 0, 8, 13]),
    seed=st.integers(0, 5),
    count=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7]),
    stream=st.booleans(),
)


@both_kinds
@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(
        st.tuples(requests, st.integers(0, 6), st.none() | st.integers(0, 20)), max_size=9
    ),
    slots=st.integers(1, 4),
)
def test_sequences_give_what_they_give_alone(kind, plan, slots):
    bench = Bench(kind(slots))
    arrivals = sorted(range(len(plan)), key=lambda i: plan[i][1])
    cancel_at: dict[int, int] = {}
    wanted: dict[int, Request] = {}
    tick = 0
    while arrivals or bench.scheduler.busy:
        while arrivals and plan[arrivals[0]][1] <= tick:
            request, _, cancel = plan[arrivals.pop(0)]
            number = bench.add(request)
            wanted[number] = request
            if cancel is not None:
                cancel_at[number] = tick + cancel
        bench.tick(*(n for n, when in cancel_at.items() if when == tick))
        tick += 1
    for number, request in wanted.items():
        last = bench.outputs[number][-1]
        assert last.last
        if last.failure is not None:
            assert last.failure.kind == "cancelled" and number in cancel_at
            continue
        alone = Bench(FakeExecutor(1))
        (only,) = alone.run(request)
        assert bench.tokens(number) == alone.tokens(0)
        assert only.finish.completion_tokens == last.finish.completion_tokens == request.max_tokens
    assert bench.scheduler.load.decoding == bench.scheduler.load.prefilling == 0


@both_kinds
def test_greedy_tokens_are_the_likeliest(kind):
    bench = Bench(kind())
    asked = [Request(prompt(3 + 5 * i, i), 10) for i in range(7)]
    for request, output in zip(asked, bench.run(*asked), strict=True):
        assert list(output.tokens) == expected(list(request.prompt), 10)


def test_a_prompt_is_read_in_chunks_between_the_others_tokens():
    bench = Bench()
    bench.add(Request(prompt(2), 20, stream=False))
    bench.tick()
    bench.add(Request(prompt(11, 1), 2))
    before = len(bench.executor.calls)
    for _ in range(3):
        bench.tick()
    assert bench.executor.calls[before:] == [
        (0, [2], [1]), (1, [0], [4]),
        (0, [3], [1]), (1, [4], [4]),
        (0, [4], [1]), (1, [8], [3]),
    ]  # fmt: skip


@both_kinds
def test_short_prompts_share_a_call(kind):
    """As many as a chunk has room for, padding included; a whole chunk is computed by itself."""
    bench = Bench(kind(slots=8), chunk=6)
    lengths = [2, 3, 1, 2, 6, 3, 3, 9]
    asked = [Request(prompt(length, i), 1) for i, length in enumerate(lengths)]
    for request, output in zip(asked, bench.run(*asked), strict=True):
        assert list(output.tokens) == expected(list(request.prompt), 1)
    read = [counts for _, _, counts in bench.executor.calls]
    assert read == [[2, 3], [1, 2], [6], [3, 3], [6], [3]]


def test_short_prompts_are_read_one_by_one_where_that_takes_no_longer():
    bench = Bench()
    bench.executor.reads_rows_at_once = False
    bench.run(*(Request(prompt(1, i), 1) for i in range(4)))
    assert [counts for _, _, counts in bench.executor.calls] == [[1]] * 4


@both_kinds
def test_a_call_for_several_prompts_that_raises_fails_them(kind):
    bench = Bench(kind(slots=3))
    bench.add(Request(prompt(5), 20))
    for _ in range(3):
        bench.tick()
    bench.executor.before = fail_when(lambda rows: len(rows) == 2)
    numbers = [bench.add(Request(prompt(2, i), 4)) for i in (1, 2, 3)]
    bench.tick()
    assert [bench.ended(number) for number in numbers] == [True, True, False]
    while bench.scheduler.busy:
        bench.executor.before = lambda rows: None
        bench.tick()
    assert bench.tokens(0) == expected(list(prompt(5)), 20)
    assert bench.tokens(numbers[2]) == expected(list(prompt(2, 3)), 4)


@pytest.mark.parametrize(("seconds", "calls"), [(0.5, 10), (2.0, 40), (8.0, 160), (None, 20)])
def test_prompts_take_what_time_the_others_leave_them(seconds, calls):
    """A call takes two seconds, and a budget is what rounds spend on them on average."""
    bench = Bench(FakeExecutor(slots=2, capacity=1000))
    bench.scheduler = Scheduler(
        bench.executor, lambda: bench.now, chunk=CHUNK, prefill_seconds=seconds
    )

    bench.add(Request(prompt(3), 200))
    bench.tick()
    bench.add(Request(prompt(900, 1), 1))
    bench.executor.calls.clear()
    read = bench.executor.prefill

    def slowly(*given):
        bench.now += 2.0
        return read(*given)

    bench.executor.prefill = slowly
    rounds = 40 if seconds else 20
    for _ in range(rounds):
        bench.tick()
    chunks = sum(counts == [CHUNK] for _, _, counts in bench.executor.calls)
    assert abs(chunks - calls) <= 1


def test_chunks_begin_at_the_same_places_whatever_was_reused():
    bench = Bench()
    first, second = prompt(14), (*prompt(10), *prompt(6, 5))
    bench.run(Request(first, 1))
    bench.executor.calls.clear()
    (output,) = bench.run(Request(second, 3))
    assert output.finish.cached_tokens == 8  # two whole chunks of the ten in common
    starts = [starts[0] for _, starts, counts in bench.executor.calls if counts != [1]]
    assert starts == [8, 12]
    assert list(output.tokens) == expected(list(second), 3)


def test_the_last_token_of_a_prompt_is_always_computed():
    bench = Bench()
    whole = prompt(2 * CHUNK)
    bench.run(Request(whole, 1))
    (again,) = bench.run(Request(whole, 1))
    assert again.finish.cached_tokens == CHUNK
    assert list(again.tokens) == expected(list(whole), 1)


def test_a_prefix_is_copied_from_a_slot_that_is_busy():
    bench = Bench()
    long = prompt(3 * CHUNK)
    bench.add(Request(long, 30))
    for _ in range(4):
        bench.tick()
    assert bench.scheduler.load.decoding == 1
    number = bench.add(Request((*long, 1, 2), 4))
    while not bench.ended(number):
        bench.tick()
    assert bench.outputs[number][-1].finish.cached_tokens == 3 * CHUNK
    assert bench.tokens(number) == expected([*long, 1, 2], 4)
    assert bench.scheduler.load.decoding == 1


def test_tenants_share_nothing():
    bench = Bench()
    bench.run(Request(prompt(12), 1, tenant="one"))
    other, own = bench.run(
        Request(prompt(12), 1, tenant="two"), Request(prompt(12), 1, tenant="one")
    )
    assert other.finish.cached_tokens == 0
    assert own.finish.cached_tokens == 8


def test_what_a_finished_sequence_held_outlives_the_move_into_its_place():
    bench = Bench()
    short, long = prompt(9), prompt(10, 1)
    bench.run(Request(short, 2), Request(long, 20))
    again, too = bench.run(Request((*short, 3), 1), Request((*long, 3), 1))
    assert again.finish.cached_tokens == too.finish.cached_tokens == 8


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_the_slot_used_longest_ago_is_given_up(slots):
    bench = Bench(FakeExecutor(slots))
    seeds = range(slots + 3)
    for seed in seeds:
        bench.run(Request(prompt(9, seed), 3))
    kept = max(1, slots - 1)  # one may be lost to moving
    last = [bench.run(Request((*prompt(9, s), 3), 1))[0] for s in reversed(seeds[-kept:])]
    assert [output.finish.cached_tokens for output in last] == [8] * kept
    (first,) = bench.run(Request((*prompt(9, 0), 3), 1))
    assert first.finish.cached_tokens == 0


@both_kinds
def test_cancelled_sequences_leave_before_the_next_step(kind):
    bench = Bench(kind())
    numbers = [bench.add(Request(prompt(3, i), 40, stream=True)) for i in range(6)]
    for _ in range(8):
        bench.tick()
    assert bench.scheduler.load.decoding == 4
    before = len(bench.executor.calls)
    bench.tick(*numbers)
    assert len(bench.executor.calls) == before  # nobody was left to run a step for
    assert bench.scheduler.load.decoding == bench.scheduler.load.waiting == 0
    assert {outputs[-1].failure.kind for outputs in bench.outputs.values()} == {"cancelled"}


@both_kinds
@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_deadlines(kind, when):
    bench = Bench(kind(slots=1))
    if when == "waiting":
        bench.add(Request(prompt(3), 50))
        bench.tick()
    number = bench.add(Request(prompt(3 * CHUNK, 1), 50, deadline=5.0))
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 5}[when]):
        bench.tick()
    bench.now = 5.0
    bench.tick()
    assert bench.outputs[number][-1].failure.kind == "timeout"
    assert not bench.scheduler.prefilling


@both_kinds
def test_rows_without_numbers_fail_alone(kind):
    executor, bad = kind(), prompt(5, 1)
    executor.change = lambda tokens, logits: (
        np.full_like(logits, np.nan) if tokens[:5] == list(bad) and len(tokens) > 8 else logits
    )
    bench = Bench(executor)
    asked = [Request(prompt(5), 12), Request(bad, 12), Request(prompt(5, 2), 12)]
    one, failed, two = bench.run(*asked)
    assert failed.failure.kind == "bad_logits"
    assert "after 9 tokens" in failed.failure.message
    for request, output in ((asked[0], one), (asked[2], two)):
        assert list(output.tokens) == expected(list(request.prompt), 12)


@both_kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_is_enough(kind, value):
    executor = kind()

    def spoil(_tokens, logits):
        logits[7 if np.isnan(value) or value > 0 else slice(None)] = value
        return logits

    executor.change = spoil
    (output,) = Bench(executor).run(Request(prompt(3), 3, SamplingParams(temperature=1.0)))
    assert output.failure.kind == "bad_logits"


def fail_when(condition):
    def before(rows):
        if condition(rows):
            raise RuntimeError("device lost")

    return before


@both_kinds
def test_a_step_that_raises_fails_its_rows_and_the_pool_goes_on(kind):
    bench = Bench(kind())
    numbers = [bench.add(Request(prompt(3, i), 12)) for i in range(6)]
    for _ in range(4):
        bench.tick()
    bench.executor.before = fail_when(lambda rows: len(rows) == 4)
    bench.tick()
    assert [bench.ended(number) for number in numbers] == [True] * 4 + [False] * 2
    assert bench.outputs[0][-1].failure.kind == "step_failed"
    assert "device lost" in bench.outputs[0][-1].failure.message
    bench.executor.before = lambda rows: None
    while bench.scheduler.busy:
        bench.tick()
    for number in numbers[4:]:
        assert bench.tokens(number) == expected(list(prompt(3, number)), 12)
    assert not bench.scheduler.dead


@both_kinds
def test_a_prompt_that_raises_fails_alone(kind):
    bench = Bench(kind())
    bench.executor.before = fail_when(lambda rows: rows[0][:3] == list(prompt(3, 1)))
    outputs = bench.run(*(Request(prompt(3, i), 6) for i in range(3)))
    assert [output.failure is None for output in outputs] == [True, False, True]


@both_kinds
def test_three_failed_steps_in_a_row_are_the_end(kind):
    bench = Bench(kind())
    bench.executor.before = fail_when(lambda rows: True)
    numbers = [bench.add(Request(prompt(3, i), 6)) for i in range(6)]
    for _ in range(3):
        assert not bench.scheduler.dead
        bench.tick()
    assert (
        "3 steps failed and none of their kind has worked since, the last with: device lost"
        in bench.scheduler.dead
    )
    kinds = [bench.outputs[number][-1].failure.kind for number in numbers]
    assert kinds == ["step_failed"] * 3 + ["engine_dead"] * 3
    assert not bench.scheduler.busy


def test_prompts_that_are_read_do_not_hide_that_no_other_step_works():
    bench = Bench()
    decode = bench.executor.decode

    def broken(*_):
        raise RuntimeError("device lost")

    bench.executor.decode = broken
    for i in range(2):
        (output,) = bench.run(Request(prompt(3, i), 6))
        assert output.failure.kind == "step_failed"
    bench.executor.decode = decode
    bench.run(Request(prompt(3, 2), 6))  # a step that works is a new beginning
    bench.executor.decode = broken
    for i in range(3):
        assert not bench.scheduler.dead
        bench.run(Request(prompt(3, i), 6))
    assert "device lost" in bench.scheduler.dead


def test_a_copy_that_raises_ends_those_that_run_and_no_more():
    bench = Bench()
    numbers = [bench.add(Request(prompt(3, i), 3 + 9 * i)) for i in range(5)]
    copy = bench.executor.copy

    def raising(*_):
        bench.executor.copy = copy
        raise RuntimeError("no copy")

    bench.executor.copy = raising
    while bench.scheduler.busy:
        bench.tick()
    kinds = [bench.outputs[n][-1].failure and bench.outputs[n][-1].failure.kind for n in numbers]
    assert kinds[0] is None
    assert kinds[-1] is None
    assert "step_failed" in kinds
    assert bench.tokens(4) == expected(list(prompt(3, 4)), 39)


@both_kinds
def test_prompt_logprobs_are_of_every_token_and_need_the_whole_prompt(kind):
    bench = Bench(kind())
    text = prompt(11)
    bench.run(Request(text, 1))
    (output,) = bench.run(Request(text, 1, prompt_logprobs=2, logprobs=0))
    assert output.finish.cached_tokens == 0
    assert output.prompt_logprobs[0] is None
    assert [found.token for found in output.prompt_logprobs[1:]] == list(text[1:])
    for at, found in enumerate(output.prompt_logprobs[1:], 1):
        from fake import logits_after

        logits = logits_after(list(text[:at])).astype(np.float64)
        log = logits - np.log(np.exp(logits).sum())
        assert found.logprob == pytest.approx(log[text[at]], abs=1e-5)
        assert [token for token, _ in found.top] == np.argsort(-log)[:2].tolist()


@both_kinds
def test_no_tokens_at_all(kind):
    (output,) = Bench(kind()).run(Request(prompt(5), 0, prompt_logprobs=0))
    assert output.tokens == ()
    assert output.finish.completion_tokens == 0
    assert len(output.prompt_logprobs) == 5


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request((), 1), "empty"),
        (Request((VOCAB,), 1), f"token id {VOCAB}; expected 0 to {VOCAB - 1}"),
        (Request((1, -1), 1), "token id -1"),
        (Request((1,) * 64, 1), "64 tokens of prompt and 1 to generate"),
        (Request((1,) * 60, 5), "hold 64 tokens together"),
        (Request((1,), -1), "-1 to generate"),
    ],
)
def test_requests_that_cannot_be_run(request_, reason):
    assert reason in fits(request_, 64, VOCAB)


@both_kinds
def test_a_full_slot_can_be_used_to_its_last_place(kind):
    text = prompt(20)
    (output,) = Bench(kind()).run(Request(text, 44))
    assert list(output.tokens) == expected(list(text), 44)


def test_the_next_step_is_begun_before_tokens_are_told():
    """On a device, which works while tokens become text; what ended meanwhile is dropped."""
    bench = Bench(FakeDevice())
    first, second = bench.add(Request(prompt(3), 3)), bench.add(Request(prompt(3, 1), 6))
    steps = []
    while bench.scheduler.busy:
        bench.tick()
        steps.append((len(bench.executor.calls), len(bench.tokens(second))))
    assert bench.tokens(first) == expected(list(prompt(3)), 3)
    assert bench.tokens(second) == expected(list(prompt(3, 1)), 6)
    begun = [starts for _, starts, counts in bench.executor.calls if counts != [3]]
    assert begun[:2] == [[3], [4, 3]], "the second joins the step after its prompt was read"
    assert max(starts[-1] for starts in begun) == 3 + 5, "one step more than its tokens need"


def test_a_device_chooses_first_tokens_too():
    """In a call for several prompts, after chunks, and after a prefix that was there.

    Not by logits that come to the host in any case, and nothing where no token is wanted.
    """
    lengths = (2, 1, 3 * CHUNK + 1, 2 * CHUNK, 3)
    drawn = [SamplingParams(temperature=1.0, top_p=0.9, seed=seed) for seed in range(6)]
    asked = [
        Request(prompt(n, 99), 6, params, logprobs=params.seed % 2 or None)
        for n, params in zip(lengths, drawn, strict=False)
    ]
    asked += [Request(prompt(7), 6, drawn[-1], prompt_logprobs=1), Request(prompt(6), 0)]
    device, host = FakeDevice(2), FakeExecutor(1)
    bench = Bench(device)
    there = bench.run(*asked)
    assert device.calls[0] == (0, [0, 0], [2, 1])
    assert device.first_tokens == len(lengths)
    assert any(output.finish.cached_tokens for output in there)
    for output, request in zip(there, asked, strict=True):
        (alone,) = Bench(host).run(request)
        assert (output.tokens, output.logprobs) == (alone.tokens, alone.logprobs)


@both_kinds
def test_logprobs_are_of_the_step_that_chose_the_token(kind):
    bench = Bench(kind())
    asked = [Request(prompt(3, i), 5, logprobs=2 if i else None) for i in range(3)]
    for request, output in zip(asked, bench.run(*asked), strict=True):
        seen = list(request.prompt)
        for token, logprob in zip(output.tokens, output.logprobs, strict=False):
            assert logprob == logprob_of(logits_after(seen), token, 2)
            seen.append(token)
        assert len(output.logprobs) == (5 if request.logprobs else 0)
