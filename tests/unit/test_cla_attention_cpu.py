"""The CPU operators against their references, for each instruction set that this machine has."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cla_export.errors import MissingEnvironment
from cla_export.plugin import compile_cpu
from cla_export.plugin.cases import GARBAGE, Case, correctness_cases
from cla_export.plugin.contract import DOMAIN, INT8_DOMAIN
from cla_export.plugin.reference import numpy_reference

FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
CLOSE = 1e-5  # of values of order 1, in float32
CASES = {
    case.name.removeprefix("float16-"): case
    for case in correctness_cases(dtypes=("float16",))
    if case.problem.head_dim >= 16
}
WIDTHS = {"native": None, "avx2": ("-mavx2", "-mfma"), "baseline": ()}


def flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module", params=WIDTHS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = WIDTHS[request.param]
    if options is None:
        return compile_cpu.library()
    if options and (platform.machine() != "x86_64" or " avx2 " not in flags()):
        pytest.skip("this processor has no AVX2")
    kept = [option for option in compile_cpu.OPTIONS if option != "-march=native"]
    folder = tmp_path_factory.mktemp(request.param)
    return compile_cpu.build(compile_cpu.compiler(), folder, (*kept, *options))


def session(
    library: Path,
    op_type: str,
    inputs: dict[str, int],
    outputs: int,
    threads: int = 2,
    *,
    domain: str = DOMAIN,
    made: int = FLOAT,
    **attributes: float,
) -> onnxruntime.InferenceSession:
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, list(inputs), names, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op_type,
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, made, None) for name in names],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def attention(library: Path, case: Case, threads: int = 2) -> onnxruntime.InferenceSession:
    problem = case.problem
    inputs = {"q": FLOAT, "key_cache": FLOAT, "value_cache": FLOAT, "kv_lengths": INT32}
    return session(
        library,
        "ClaAttention",
        inputs,
        1,
        threads,
        scale=problem.scale,
        window=problem.window,
        softcap=float(problem.softcap),
    )


def feed_of(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs with garbage behind each row's length, and the expected output."""
    random, problem = np.random.default_rng(seed), case.problem
    q = random.standard_normal(problem.query_shape, np.float32)
    caches = [random.standard_normal(problem.cache_shape, np.float32) for _ in range(2)]
    lengths = np.array(case.lengths, np.int32)
    options = {"scale": problem.scale, "window": problem.window, "softcap": problem.softcap}
    expected = numpy_reference(q, *caches, lengths, **options)
    for cache in caches:
        for row, length in enumerate(case.lengths):
            for i, garbage in enumerate(GARBAGE):
                cache[row, :, length + i :: len(GARBAGE)] = garbage
    feed = {"q": q, "key_cache": caches[0], "value_cache": caches[1], "kv_lengths": lengths}
    return feed, expected


def packed(array: np.ndarray) -> np.ndarray:
    """[B, H, S, D] as [B, S, H * D]."""
    batch, _, tokens, _ = array.shape
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(batch, tokens, -1)


def check(name: str, run: Any, feed: dict[str, np.ndarray], expected: np.ndarray) -> None:
    """Both layouts of the queries give what is expected."""
    limit = CLOSE * max(1.0, float(np.abs(expected).max()))
    limit *= 10 if name == "big-scores" else 1  # their own rounding, before the exponential
    (y,) = run.run(None, feed)
    assert np.abs(y - expected).max() <= limit
    (y,) = run.run(None, {**feed, "q": packed(feed["q"])})
    assert np.abs(y - packed(expected)).max() <= limit


@pytest.mark.parametrize("name", CASES)
def test_attention(library: Path, name: str) -> None:
    check(name, attention(library, CASES[name]), *feed_of(CASES[name]))


def test_the_bits_depend_on_neither_threads_nor_neighbours(library: Path) -> None:
    case = CASES["heads-16-1"]
    feed, _ = feed_of(case)
    (one,) = attention(library, case, threads=1).run(None, feed)
    (two,) = attention(library, case, threads=2).run(None, feed)
    assert np.array_equal(one, two)
    alone = {name: value[2:5] for name, value in feed.items()}
    (some,) = attention(library, case).run(None, alone)
    assert np.array_equal(some, one[2:5])


def test_nothing_outside_a_row_is_read(library: Path) -> None:
    """A row that fills its cache ends where the memory does."""
    case = CASES["heads-16-1"]
    feed, expected = feed_of(case)
    last = {name: np.ascontiguousarray(value[:1]) for name, value in feed.items()}
    assert int(last["kv_lengths"][0]) == case.problem.capacity
    (y,) = attention(library, case).run(None, last)
    assert np.abs(y - expected[:1]).max() <= CLOSE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lengths": np.array([301] + [0] * 6, np.int32)}, "within 0 and the cache's capacity"),
        ({"kv_lengths": np.array([-1] * 7, np.int32)}, "within 0 and the cache's capacity"),
        ({"kv_lengths": np.array([1, 2], np.int32)}, r"kv_lengths \[B\]"),
        ({"q": np.zeros((7, 1, 100), np.float32)}, "q heads that divide"),
        ({"value_cache": np.zeros((7, 1, 299, 128), np.float32)}, "must both be"),
    ],
)
def test_wrong_calls_are_refused(library: Path, change: dict[str, np.ndarray], words: str) -> None:
    case = CASES["heads-16-1"]
    feed, _ = feed_of(case)
    with pytest.raises(Exception, match=words):
        attention(library, case).run(None, {**feed, **change})


APPEND = {"past_key": FLOAT, "past_value": FLOAT, "k": FLOAT, "v": FLOAT, "starts": INT64}


def append_feed(tokens: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    pasts = [random.standard_normal((2, 3, 8, 20), np.float32) for _ in range(2)]
    fresh = [random.standard_normal((2, tokens, 60), np.float32) for _ in range(2)]
    return dict(zip(APPEND, (*pasts, *fresh, np.array([5, 0])), strict=True))


def appended(feed: dict[str, np.ndarray], part: int) -> np.ndarray:
    past, fresh = list(feed.values())[part].copy(), list(feed.values())[2 + part]
    for row, start in enumerate(feed["starts"]):
        tokens = fresh.shape[1]
        heads = fresh[row].reshape(tokens, 3, 20).transpose(1, 0, 2)
        past[row, :, start : start + tokens] = heads
    return past


@pytest.mark.parametrize("tokens", [1, 3])
def test_append(library: Path, tokens: int) -> None:
    feed = append_feed(tokens)
    expected = [appended(feed, part) for part in (0, 1)]
    run = session(library, "ClaAppend", APPEND, 2)
    for got, want in zip(run.run(None, feed), expected, strict=True):
        assert np.array_equal(got, want)
    binding = run.io_binding()
    for name, value in feed.items():
        if name in ("past_key", "past_value"):
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output("y0" if name == "past_key" else "y1", shared)
        else:
            binding.bind_cpu_input(name, value)
    run.run_with_iobinding(binding)
    assert np.array_equal(feed["past_key"], expected[0]), "in place"
    assert np.array_equal(feed["past_value"], expected[1])


def test_append_refuses_what_does_not_fit(library: Path) -> None:
    run = session(library, "ClaAppend", APPEND, 2)
    for starts in ([6, 0], [0, -1]):
        with pytest.raises(Exception, match="do not fit into the cache"):
            run.run(None, {**append_feed(3), "starts": np.array(starts)})


# int8 caches: what they hold is integers times a scale for each head and channel.


def narrow_attention(library: Path, case: Case, threads: int = 2) -> onnxruntime.InferenceSession:
    problem = case.problem
    inputs = {"q": FLOAT, "key_cache": INT8, "value_cache": INT8, "kv_lengths": INT32}
    return session(
        library,
        "ClaAttention",
        inputs | {"key_scales": FLOAT, "value_scales": FLOAT},
        1,
        threads,
        domain=INT8_DOMAIN,
        scale=problem.scale,
        window=problem.window,
        softcap=float(problem.softcap),
    )


def narrow_feed(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs with the largest integers behind each row's length, and the expected output."""
    random, problem = np.random.default_rng(seed), case.problem
    _, heads, _, dim = problem.cache_shape
    q = random.standard_normal(problem.query_shape, np.float32)
    scales = [random.uniform(0.2, 3, (1, heads, 1, dim)).astype(np.float32) / 64 for _ in range(2)]
    caches = [random.integers(-128, 128, problem.cache_shape, np.int8) for _ in range(2)]
    lengths = np.array(case.lengths, np.int32)
    options = {"scale": problem.scale, "window": problem.window, "softcap": problem.softcap}
    whole = [cache.astype(np.float64) * scale for cache, scale in zip(caches, scales, strict=True)]
    expected = numpy_reference(q, *whole, lengths, **options)
    for cache in caches:
        for row, length in enumerate(case.lengths):
            cache[row, :, length:] = 127
    names = ("q", "key_cache", "value_cache", "kv_lengths", "key_scales", "value_scales")
    return dict(zip(names, (q, *caches, lengths, *scales), strict=True)), expected


@pytest.mark.parametrize("name", CASES)
def test_attention_over_an_int8_cache(library: Path, name: str) -> None:
    check(name, narrow_attention(library, CASES[name]), *narrow_feed(CASES[name]))


def test_an_int8_row_has_the_same_bits_alone(library: Path) -> None:
    case = CASES["heads-16-1"]
    feed, _ = narrow_feed(case)
    (one,) = narrow_attention(library, case, threads=1).run(None, feed)
    (two,) = narrow_attention(library, case, threads=2).run(None, feed)
    assert np.array_equal(one, two)
    alone = {n: value[2:5] if len(value) > 1 else value for n, value in feed.items()}
    (some,) = narrow_attention(library, case).run(None, alone)
    assert np.array_equal(some, one[2:5])


NARROW_APPEND = {
    **dict.fromkeys(("past_key", "past_value"), INT8),
    **dict.fromkeys(("k", "v"), FLOAT),
    "starts": INT64,
    **dict.fromkeys(("key_scales", "value_scales"), FLOAT),
}


def narrow_append_feed(tokens: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Ties, and numbers beyond the range, among the tokens; and what the caches hold then."""
    random = np.random.default_rng(0)
    pasts = [random.integers(-128, 128, (2, 3, 8, 20), np.int8) for _ in range(2)]
    scales = [np.ldexp(1.0, random.integers(-6, 0, (1, 3, 1, 20))).astype(np.float32)] * 2
    steps = [random.integers(-300, 300, (2, tokens, 60)) / 2 for _ in range(2)]
    widths = [scale[0, :, 0].reshape(60) for scale in scales]
    fresh = [(s * w).astype(np.float32) for s, w in zip(steps, widths, strict=True)]
    feed = dict(zip(NARROW_APPEND, (*pasts, *fresh, np.array([5, 0]), *scales), strict=True))
    rounded = [np.clip(np.rint(s), -128, 127) for s in steps]  # numpy rounds half to even
    return feed, [appended({**feed, "k": rounded[0], "v": rounded[1]}, part) for part in (0, 1)]


@pytest.mark.parametrize("tokens", [1, 3])
def test_append_rounds_to_an_int8_cache(library: Path, tokens: int) -> None:
    feed, expected = narrow_append_feed(tokens)
    run = session(library, "ClaAppend", NARROW_APPEND, 2, domain=INT8_DOMAIN, made=INT8)
    for got, want in zip(run.run(None, feed), expected, strict=True):
        assert np.array_equal(got, want)


def test_scales_of_another_shape_are_refused(library: Path) -> None:
    case = CASES["heads-16-4"]
    feed, _ = narrow_feed(case)
    wrong = {"value_scales": feed["value_scales"].reshape(1, 1, 4, -1)}
    with pytest.raises(Exception, match=r"must be \[1, Hkv, 1, D\]"):
        narrow_attention(library, case).run(None, {**feed, **wrong})
    run = session(library, "ClaAppend", NARROW_APPEND, 2, domain=INT8_DOMAIN, made=INT8)
    feed, _ = narrow_append_feed(1)
    with pytest.raises(Exception, match=r"must be \[1, Hkv, 1, D\]"):
        run.run(None, {**feed, "key_scales": feed["key_scales"][:, :2]})


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 17, 150])
@pytest.mark.parametrize("shape", [(5, 24), (64, 768), (37, 46), (130, 2100), (3, 7)])
def test_linear(library: Path, tokens: int, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(tokens)
    w = random.standard_normal(shape, np.float32)
    x = random.standard_normal((1, tokens, shape[1]), np.float32)
    (y,) = session(library, "ClaLinear", {"x": FLOAT, "w": FLOAT}, 1).run(None, {"x": x, "w": w})
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() <= CLOSE * np.sqrt(shape[1])


def test_linear_of_other_widths_is_refused(library: Path) -> None:
    run = session(library, "ClaLinear", {"x": FLOAT, "w": FLOAT}, 1)
    with pytest.raises(Exception, match=r"a weight \[N, K\]"):
        run.run(None, {"x": np.zeros((2, 5), np.float32), "w": np.zeros((3, 4), np.float32)})


# Compiling.


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = compile_cpu.compiler()
    first = compile_cpu.build(command, tmp_path)
    monkeypatch.setattr(compile_cpu, "_compile", lambda _: pytest.fail("compiled again"))
    assert compile_cpu.build(command, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "no scraps"


def test_what_a_failed_compilation_says(tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironment, match=r"no-such-compiler.*apt install gcc"):
        compile_cpu.build(["no-such-compiler"], tmp_path)
    with pytest.raises(MissingEnvironment, match=r"false .* failed with 1"):
        compile_cpu.build(["false"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(compile_cpu, "find_spec", lambda _: None)
    with pytest.raises(MissingEnvironment, match=r"no C compiler.*ziglang"):
        compile_cpu.compiler()
    monkeypatch.setattr(compile_cpu, "find_spec", lambda _: object())
    assert compile_cpu.compiler()[1:] == ["-m", "ziglang", "cc"]
    monkeypatch.setenv("CC", "ccache gcc")
    assert compile_cpu.compiler() == ["ccache", "gcc"]
