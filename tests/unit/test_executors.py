"""Executors: every way of driving the caches gives the same logits, and the same memory is used."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models_zoo import (
    BASE,
    MIXED,
    Zoo,
    drive,
    stateless_kv,
    stateless_logits,
    tokens_of,
)

from cla_export.engines.executor import PooledExecutor
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.torch import TorchExecutor
from cla_export.errors import BadInput, BundleError, MissingEnvironment

CLOSE = 1e-4  # float32 through other kernels; measured errors stay under 1e-5
KINDS = ("torch", "onnxruntime", "stock", "portable")  # stock: ONNX Runtime's own operators
VOCAB, POSITIONS = BASE["vocab_size"], BASE["max_position_embeddings"]
STALE = 77.0  # what every slot holds before a test: reading beyond a row must show
Make = Callable[..., PooledExecutor]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def open_kind(zoo: Zoo, kind: str, capacity: int | None, slots: int) -> OnnxRuntimeExecutor:
    bundle = zoo.bundle("portable" if kind == "portable" else "onnxruntime", **MIXED)
    stock = kind == "stock"
    made = OnnxRuntimeExecutor(bundle, capacity=capacity, slots=slots, threads=1, stock=stock)
    assert made.graph == (bundle.cpu_graph if kind == "onnxruntime" else bundle.graph)
    return made


@pytest.fixture
def make(zoo: Zoo, kind: str) -> Make:
    """An executor of this kind over MIXED, its slots full of stale numbers."""

    def executor(capacity: int | None = 24, slots: int = 4) -> PooledExecutor:
        made: PooledExecutor
        if kind == "torch":
            capacity = POSITIONS if capacity is None else capacity
            made = TorchExecutor(zoo.model(**MIXED), capacity=capacity, slots=slots)
        else:
            made = open_kind(zoo, kind, capacity, slots)
        for group in range(made.layout.num_groups):
            for pool in made.cache(group):
                pool[...] = STALE
        return made

    return executor


def check_cache(zoo: Zoo, executor: PooledExecutor, slot: int, text: list[int]) -> None:
    """The slot holds what the model computes for the text, and nothing was written behind it."""
    for group, expected in enumerate(stateless_kv(zoo.model(**MIXED), text)):
        for pool, cached in zip(executor.cache(group), expected, strict=True):
            assert np.abs(pool[slot][:, : len(text)] - cached).max() <= CLOSE


def test_pools_are_those_of_the_groups(make: Make) -> None:
    executor = make(capacity=24, slots=4)
    assert executor.layout.num_groups == 2
    for group in executor.layout.groups:
        key, value = executor.cache(group.index)
        assert key.shape == value.shape == (4, group.kv_heads, 24, group.head_dim)
        assert not np.shares_memory(key, value)
    assert not np.shares_memory(executor.cache(0)[0], executor.cache(1)[0])
    starts = [pool.ctypes.data for group in range(2) for pool in executor.cache(group)]
    assert [start % 64 for start in starts] == [0] * 4, "whole cache lines"
    assert (executor.capacity, executor.slots, executor.vocab_size) == (24, 4, VOCAB)


def test_capacity_defaults_to_the_models_positions(make: Make) -> None:
    assert make(capacity=None, slots=1).capacity == POSITIONS


def test_ragged_prefill_and_decode(zoo: Zoo, make: Make) -> None:
    model, prompts = zoo.model(**MIXED), [1, 11, 7, 4]
    texts = [tokens_of(prompt + 10, seed) for seed, prompt in enumerate(prompts)]
    executor = make()
    for row, logits in enumerate(drive(executor, texts, prompts)):
        expected = stateless_logits(model, texts[row])[prompts[row] - 1 :]
        assert np.abs(logits - expected).max() <= CLOSE
        check_cache(zoo, executor, row, texts[row])


def test_chunked_prefill(zoo: Zoo, make: Make) -> None:
    text, executor = tokens_of(20), make()
    expected = stateless_logits(zoo.model(**MIXED), text)
    start = 0
    for chunk in (7, 1, 5, 1, 6):
        logits = executor.prefill(2, text[start : start + chunk], start, keep=chunk)
        assert logits.shape == (chunk, VOCAB)
        assert np.abs(logits - expected[start : start + chunk]).max() <= CLOSE
        start += chunk
    check_cache(zoo, executor, 2, text)


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_keep_gives_the_last_logits_in_order(zoo: Zoo, make: Make, keep: int) -> None:
    text = tokens_of(9)
    logits = make().prefill(0, text, 0, keep=keep)
    expected = stateless_logits(zoo.model(**MIXED), text)[-keep:]
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= CLOSE


def test_a_slot_can_be_filled_to_the_last_token(zoo: Zoo, make: Make) -> None:
    text, executor = tokens_of(24), make()
    executor.prefill(3, text[:22], 0)
    for step in (22, 23):
        logits = executor.decode([3], [text[step]], [step])
    assert np.abs(logits[0] - stateless_logits(zoo.model(**MIXED), text)[-1]).max() <= CLOSE
    check_cache(zoo, executor, 3, text)


def test_a_slot_used_again_and_one_rewound(zoo: Zoo, make: Make) -> None:
    """What a longer text left behind is never read; going back to an earlier length is free."""
    model, executor = zoo.model(**MIXED), make()
    executor.prefill(1, tokens_of(20, 5), 0)
    text = tokens_of(9, 6)
    logits = executor.prefill(1, text[:8], 0)
    assert np.abs(logits[-1] - stateless_logits(model, text)[7]).max() <= CLOSE
    executor.decode([1], [text[8]], [8])
    other = [*text[:5], *tokens_of(3, 7)]
    logits = executor.prefill(1, other[5:], 5, keep=3)
    assert np.abs(logits - stateless_logits(model, other)[5:]).max() <= CLOSE


def test_a_slot_that_is_given_what_another_holds(make: Make) -> None:
    executor = make()
    text, other = tokens_of(14, 7), tokens_of(9, 8)
    expected = executor.prefill(0, text, 0)
    executor.prefill(2, other, 0)
    executor.copy(0, 2, 10)
    assert np.abs(executor.prefill(2, text[10:], 10) - expected).max() < CLOSE
    assert np.abs(executor.prefill(0, text[13:], 13) - expected).max() < CLOSE


def test_everything_is_written_in_place(make: Make) -> None:
    """The pools are one allocation for good; a step writes its tokens there and nothing else."""
    executor = make()
    pools = [pool for group in range(2) for pool in executor.cache(group)]
    addresses = [pool.ctypes.data for pool in pools]
    before = [pool.copy() for pool in pools]
    executor.prefill_rows(1, [tokens_of(5), tokens_of(3)])
    executor.decode([1, 2], [4, 5], [5, 3])
    after = [pool for group in range(2) for pool in executor.cache(group)]
    assert [pool.ctypes.data for pool in after] == addresses
    for old, pool in zip(before, after, strict=True):
        changed = (pool != old).any(axis=(1, 3))  # [slots, C]
        assert changed[1, :6].all()
        assert changed[2, :4].all()
        assert not changed[[0, 3]].any(), "the neighbours' slots"
        assert not changed[1, 6:].any()
        assert not changed[2, 5:].any()  # position 4 took the shorter row's padding


def test_no_buffer_of_the_size_of_a_cache_is_returned(zoo: Zoo) -> None:
    """ONNX Runtime gets the pools as outputs too, so `present` is never allocated."""
    for target in ("onnxruntime", "portable"):
        executor = OnnxRuntimeExecutor(zoo.bundle(target, **MIXED), capacity=24, slots=2, threads=1)
        names = [name for name, _ in executor._views_of(0, 2)]
        assert names == [f"{group}.{part}" for group in range(2) for part in ("key", "value")]
        for (_, value), pool in zip(
            executor._views_of(0, 2),
            [pool for group in range(2) for pool in executor.cache(group)],
            strict=True,
        ):
            assert value.data_ptr() == pool.ctypes.data
        second = executor._views_of(1, 1)[0][1]
        assert second.data_ptr() == executor.cache(0)[0][1:].ctypes.data


# Rows are checked before anything is computed.


def check_refused(executor: PooledExecutor, call: Callable[[], object], *parts: str) -> None:
    before = [pool.copy() for group in range(2) for pool in executor.cache(group)]
    with pytest.raises(BadInput) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    after = [pool for group in range(2) for pool in executor.cache(group)]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def test_rows_that_do_not_fit(make: Make) -> None:
    executor = make()
    cases = [
        (
            lambda: executor.prefill(0, tokens_of(25), 0),
            ["slot 0: 0 tokens held and 25 new ones", "capacity is 24"],
        ),
        (lambda: executor.prefill(0, [1], 24), ["slot 0: 24 tokens held and 1 new"]),
        (lambda: executor.prefill(2, [1], -1), ["slot 2: -1 tokens held"]),
        (lambda: executor.decode([0, 1], [1, 1], [5, 24]), ["slot 1: 24 tokens held"]),
        (lambda: executor.prefill_rows(0, [[1], tokens_of(25)]), ["25 new ones"]),
    ]
    for call, parts in cases:
        check_refused(executor, call, *parts)


def test_tokens_outside_the_vocabulary(make: Make) -> None:
    executor = make()
    for token in (-1, VOCAB, 10**12):
        check_refused(
            executor,
            lambda token=token: executor.prefill_rows(1, [[1], [2, token]]),
            f"slot 2: token id {token}",
            f"0 to {VOCAB - 1}",
        )


def test_slots_that_are_not_there_or_not_in_a_row(make: Make) -> None:
    executor = make()
    cases = [
        (lambda: executor.prefill(4, [1], 0), ["slots 4 to 4", "some of 0 to 3"]),
        (lambda: executor.prefill(-1, [1], 0), ["slots -1 to -1"]),
        (lambda: executor.prefill_rows(3, [[1], [1]]), ["slots 3 to 4"]),
        (lambda: executor.decode([0, 2], [1, 1], [0, 0]), ["slots are [0, 2]", "consecutive"]),
        (lambda: executor.decode([1, 0], [1, 1], [0, 0]), ["slots are [1, 0]", "consecutive"]),
        (lambda: executor.decode([0, 0], [1, 1], [0, 0]), ["slots are [0, 0]", "consecutive"]),
        (lambda: executor.decode([0, 1], [1], [0, 0]), ["2 slots, 1 tokens and 2 lengths"]),
    ]
    for call, parts in cases:
        check_refused(executor, call, *parts)


def test_rows_without_tokens(make: Make) -> None:
    executor = make()
    cases = [
        (lambda: executor.prefill_rows(0, [[1], []]), ["slot 1: no tokens", "at least one"]),
        (lambda: executor.prefill_rows(0, []), ["no rows"]),
        (lambda: executor.decode([], [], []), ["no rows"]),
        (lambda: executor.prefill(0, [], 0), ["slot 0: no tokens"]),
        (lambda: executor.prefill(0, [1, 2], 0, keep=3), ["keep is 3", "1 to 2"]),
        (lambda: executor.prefill(0, [1, 2], 0, keep=0), ["keep is 0", "1 to 2"]),
    ]
    for call, parts in cases:
        check_refused(executor, call, *parts)


def test_several_chunks_after_held_tokens(zoo: Zoo) -> None:
    """GroupQueryAttention does not take them, and its graph says so before it runs."""
    kinds = ("onnxruntime", "stock", "portable")
    executors = {kind: open_kind(zoo, kind, 24, 2) for kind in kinds}
    texts, held = [tokens_of(9, 1), tokens_of(9, 2)], [2, 5]
    for executor in executors.values():
        executor.prefill_rows(0, [text[:n] for text, n in zip(texts, held, strict=True)])
    chunks = [text[n : n + 3] for text, n in zip(texts, held, strict=True)]
    check_refused(
        executors["stock"],
        lambda: executors["stock"]._step(0, chunks, held, 1),
        "2 rows of up to 3 new tokens",
        "prefill one slot at a time",
    )
    model = zoo.model(**MIXED)
    for kind in ("onnxruntime", "portable"):
        logits = executors[kind]._step(0, chunks, held, 3)
        for row, (text, start) in enumerate(zip(texts, held, strict=True)):
            expected = stateless_logits(model, text)[start : start + 3]
            assert np.abs(logits[row] - expected).max() <= CLOSE


# What cannot be opened.


@pytest.mark.parametrize(("capacity", "slots"), [(0, 1), (8, 0), (-1, 1)])
def test_no_room_at_all(make: Make, capacity: int, slots: int) -> None:
    with pytest.raises(BadInput, match=f"capacity is {capacity} and slots {slots}"):
        make(capacity=capacity, slots=slots)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_logits_far_from_the_start(zoo: Zoo, stock: bool) -> None:
    """Tables of angles are stored: computed in the graph, they drift by 1e-3 at position 8192."""
    far = {"kv_owner": (0, 0), "head_dim": 64, "num_key_value_heads": 1, "num_attention_heads": 2}
    model = {**far, "hidden_size": 128, "max_position_embeddings": 8200}
    bundle = zoo.bundle("onnxruntime", **model)
    executor = OnnxRuntimeExecutor(bundle, capacity=8200, slots=1, threads=1, stock=stock)
    tokens = tokens_of(8193)
    executor.prefill(0, tokens[:8192], 0)
    logits = executor.decode([0], tokens[8192:], [8192])
    expected = stateless_logits(zoo.model(**model), tokens)[-1]
    assert np.abs(logits[0] - expected).max() < 5e-5
    # One position off shows.
    assert np.abs(executor.decode([0], tokens[8192:], [8191])[0] - expected).max() > 5e-4


def test_more_capacity_than_positions(zoo: Zoo) -> None:
    with pytest.raises(BadInput, match=r"capacity is 65; the model has 64 positions"):
        OnnxRuntimeExecutor(zoo.bundle(**MIXED), capacity=65)


def test_bfloat16_needs_another_machine(zoo: Zoo) -> None:
    """ONNX Runtime's CPU provider has no bfloat16: that is the environment, not the input."""
    with pytest.raises(MissingEnvironment, match="dtype bfloat16") as caught:
        OnnxRuntimeExecutor(zoo.bundle(dtype="bf16", kv_owner=(0,)))
    assert caught.value.exit_code == 3
    assert "--dtype fp32" in str(caught.value)


def test_float16(zoo: Zoo) -> None:
    overrides = {"kv_owner": (0, 0)}
    executor = OnnxRuntimeExecutor(zoo.bundle(dtype="fp16", **overrides), capacity=16, threads=1)
    assert {pool.dtype for pool in executor.cache(0)} == {np.dtype(np.float16)}
    text = tokens_of(12)
    logits = executor.prefill(0, text, 0, keep=12)
    assert logits.dtype == np.float32
    expected = stateless_logits(zoo.model(**overrides), text)
    assert np.abs(logits - expected).max() < 0.05  # 11 bits, logits up to 8


def test_a_graph_that_is_none(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    broken = replace(zoo.bundle(**MIXED), folder=tmp_path)
    with pytest.raises(BundleError, match="cannot open it") as caught:
        OnnxRuntimeExecutor(broken)
    assert "model.onnx" in str(caught.value)


def test_running_a_bundle_loads_no_library_of_graphs(zoo: Zoo) -> None:
    """They would weigh 50 MiB, and a server would start a third of a second later."""
    code = (
        "import sys, cla_export.serve.server, cla_export.benchmark\n"
        "from cla_export.bundle import open_bundle\n"
        "from cla_export.engines.opening import open_executor\n"
        "open_executor(open_bundle(sys.argv[1])).decode([0], [1], [0])\n"
        "heavy = 'torch', 'onnx', 'onnx_ir', 'onnxscript', 'sympy', 'matplotlib'\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    folder = str(zoo.bundle("onnxruntime", **MIXED).folder)
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
