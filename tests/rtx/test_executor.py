"""The TensorRT executor over a *simulated* context: engines are really built, but not run.

The memory it binds, views, lengths and captures are exercised as a GPU would; see
`simulated_tensorrt`.
"""

import shutil
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from models_zoo import MIXED, Zoo
from simulated_tensorrt import SimulatedMemory, simulate
from typer.testing import CliRunner

from cla_export.bundle import Bundle
from cla_export.cli import app
from cla_export.compare.gate import compare_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.tensorrt import TensorRTExecutor
from cla_export.engines.tensorrt_build import build, find_engine, open_engine
from cla_export.engines.tensorrt_runtime import Loaded, check_gpu, check_version, load_engine
from cla_export.environment import nvidia_gpus
from cla_export.errors import BadInput, BundleError, MissingEnvironment, RunError
from cla_export.generation import load
from cla_export.sampling import Sampler, SamplingParams, choose

pytest.importorskip("tensorrt_rtx", reason="pip install 'cla-export[rtx]'")

SMALL = {"capacity": 48, "slots": 5, "chunk": 7, "compute_capabilities": ("8.9",)}
CLOSE = 2e-2  # both run in float16, in other calls; logits are of order 1 to 5


@pytest.fixture(scope="module")
def bundle(zoo: Zoo, tmp_path_factory) -> Bundle:
    """MIXED, with an engine."""
    source = zoo.bundle("tensorrt-rtx", "fp16", **MIXED)
    folder = tmp_path_factory.mktemp("engine") / "b"
    shutil.copytree(source.folder, folder)
    made = replace(source, folder=folder)
    build(made, **SMALL)
    return made


@pytest.fixture
def portable(zoo: Zoo) -> Bundle:
    return zoo.bundle("portable", "fp16", **MIXED)


@pytest.fixture
def make(bundle: Bundle, portable: Bundle):
    def executor(load=None, **options) -> TensorRTExecutor:
        return TensorRTExecutor(bundle, load=load or simulate(portable), **options)

    return executor


def memory_of(executor: TensorRTExecutor) -> SimulatedMemory:
    return executor._memory


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, count).tolist()


def test_prompts_chunks_and_steps_agree_with_onnx_runtime(make, portable: Bundle):
    ours = make()
    other = OnnxRuntimeExecutor(portable, capacity=48, slots=5, threads=1)
    assert (ours.capacity, ours.slots, ours.chunk) == (48, 5, 7)
    texts = [tokens(count, count) for count in (3, 17, 1, 30)]  # 17 and 30 take several calls
    for executor in (ours, other):
        executor.write(1, 3, *(part * 0 + 9 for part in executor.read(1, 3)))  # stale
    for slot, text in enumerate(texts):
        got, want = (made.prefill(slot, text, 0, keep=min(9, len(text))) for made in (ours, other))
        assert got.shape == want.shape == (min(9, len(text)), 61)
        assert np.abs(got - want).max() <= CLOSE
    lengths = [len(text) for text in texts]
    for step in range(4):
        for first, last in ((0, 4), (1, 3), (0, 2), (0, 4)):  # the first slots, and later ones
            rows = slice(first, last)
            new = tokens(last - first, 50 + step)
            call = (range(first, last), new, lengths[rows])
            assert np.abs(ours.decode(*call) - other.decode(*call)).max() <= CLOSE
            lengths[rows] = [length + 1 for length in lengths[rows]]
    for group in range(ours.layout.num_groups):
        for slot, length in enumerate(lengths):
            for got, want in zip(ours.read(group, slot), other.read(group, slot), strict=True):
                error = np.abs(got[:, :length].astype(np.float32) - want[:, :length])
                assert error.max() <= CLOSE


def test_rows_of_several_tokens_run_one_by_one(make, portable: Bundle):
    ours = make()
    other = OnnxRuntimeExecutor(portable, capacity=48, slots=5, threads=1)
    texts = [tokens(count, count) for count in (12, 2, 8)]
    got, want = (made.prefill_rows(1, texts) for made in (ours, other))
    assert np.abs(got - want).max() <= CLOSE


def test_a_slot_is_copied_on_the_device(make):
    ours = make()
    text = tokens(20)
    expected = ours.prefill(1, text, 0)
    ours.copy(1, 4, 16)
    assert np.abs(ours.prefill(4, text[16:], 16) - expected).max() <= CLOSE


def test_decode_of_the_first_slots_is_captured_after_one_run(make):
    """Each size has a context of its own, which nothing changes after its capture."""
    ours = make()
    memory = memory_of(ours)
    for slot in range(3):
        ours.prefill(slot, tokens(4), 0)
    for step in range(3):
        ours.decode(range(3), [1, 2, 3], [4 + step] * 3)
        ours.prefill(4, tokens(9), 0, keep=9)  # another context in between, and more logits
        ours.decode([1], [1], [20])
    assert memory.launches == 2  # the first call ran by itself
    ours.decode([0, 1], [1, 2], [9, 9])
    assert memory.launches == 2
    assert {rows: call.captured for rows, call in ours._steps.items()} == {3: True, 2: False}
    plain = make(graphs=False)
    for _ in range(3):
        plain.decode([0], [1], [0])
    assert memory_of(plain).launches == 0


def test_tokens_are_chosen_where_the_logits_are(make):
    """The kernel that does it is simulated too; on a GPU it runs in tests/gpu."""
    executor, plain = make(), make()
    ways = [SamplingParams(), SamplingParams(temperature=0.9, top_k=7, presence_penalty=0.5)]
    first, second = ([Sampler(way, choice=3) for way in ways] for _ in range(2))
    last, lengths = [4, 5], [3, 3]
    for made in (executor, plain):
        for slot in (0, 1):
            made.prefill(slot, tokens(3, slot), 0)
    assert executor.chooser is executor
    for step in range(5):
        held = [length + step for length in lengths]
        executor.begin_decode([0, 1], last, held, [sampler.next_choice() for sampler in first])
        late = tokens(1 + 8 * step, step)  # one token, then several chunks
        (other,) = executor.prefill_and_choose(3, [late], [0], [Sampler(ways[0]).next_choice()])
        expected = plain.prefill(3, late, 0)
        assert other == expected.argmax()
        assert np.array_equal(executor.logits_of(0), expected[0])
        chosen = executor.end_decode()
        logits = plain.decode([0, 1], last, held)
        assert chosen == choose(logits, second)
        assert np.array_equal(executor.logits_of(1), logits[1])
        for sampler, token in zip(first, chosen, strict=True):
            sampler.take(token)
        last = chosen
    assert memory_of(executor).launches == memory_of(plain).launches > 0


def test_the_simulation_keeps_the_rules(make, portable: Bundle):
    """It would notice: memory outside of an allocation, and a captured context that is changed."""
    ours = make()
    memory = memory_of(ours)
    with pytest.raises(AssertionError, match="not inside an allocation"):
        memory.download(next(iter(memory.blocks)) - 8, np.zeros(1, np.int64))
    for step in range(2):
        ours.decode([0], [1], [step])
    ours._bind(ours._steps[1], 1, (1, 1), 1, ours._stepped.address)
    with pytest.raises(AssertionError, match="a captured context was changed"):
        ours.decode([0], [1], [2])
    ours = make()
    call = ours._new_call(0, fixed=True)
    ours._bind(call, 0, (2, 1), 1, ours._stepped.address)
    with pytest.raises(AssertionError, match="before it ran"):
        call.capture(ours._memory.stream, ours._memory.capture)


def test_device_memory_is_accounted_for(make, bundle: Bundle):
    ours = make(slots=2)
    ours.decode([0], [1], [0])
    sizes = ours.device_bytes
    assert sizes["caches"] == 2 * 48 * bundle.layout.bytes_per_token("float16")
    assert sizes["activations"] == 4096
    assert sizes["weights"] == (ours.folder / "model.engine").stat().st_size
    held = sum(size for size, _ in memory_of(ours).blocks.values())
    assert held == sum(sizes.values()) - sizes["weights"]


def test_engines_that_do_not_fit_are_refused(make, bundle: Bundle, portable: Bundle, tmp_path):
    with pytest.raises(BadInput, match=r"slots is 6; .* was built for 5"):
        make(slots=6)
    with pytest.raises(RunError, match="would not be written in place"):
        make(simulate(portable, aliased=False))
    none = replace(bundle, folder=tmp_path)
    with pytest.raises(BundleError, match="no engine for tensorrt-rtx; build one: cla-export bu"):
        TensorRTExecutor(none)
    engines = bundle.folder / "engines"
    built = open_engine(bundle, next(engines.iterdir()))
    with pytest.raises(BundleError, match=r"built with tensorrt-rtx .* and 1\.0 is installed; reb"):
        check_version(bundle, built, "1.0")
    with pytest.raises(BundleError) as caught:
        check_gpu(bundle, built, "A GPU", "12.0")
    assert "built for compute capability 8.9" in str(caught.value)
    assert '--capacity 48 --slots 5 --chunk 7 --compute-capability "12.0" --force' in str(
        caught.value
    )
    check_gpu(bundle, built, "A GPU", "8.9")
    record = {**built.record, "flavour": "tensorrt", "gpu": "NVIDIA H200"}
    other = replace(built, record=record)
    check_gpu(bundle, other, "NVIDIA H200", "9.0")
    with pytest.raises(BundleError, match="built for NVIDIA H200; this machine's GPU is A GPU"):
        check_gpu(bundle, other, "A GPU", "9.0")


class FakeTensorRT(ModuleType):
    """Records what an engine is asked for; there is no TensorRT behind it."""

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            self.severity = severity

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "managed by us"

    def __init__(self, version: str, *, refits: bool = True) -> None:
        super().__init__("fake")
        self.__spec__ = ModuleSpec("tensorrt", None)
        self.__version__ = version
        self.asked: list[str] = []
        self.refits = refits
        self.engine = SimpleNamespace(
            get_weight_streaming_automatic_budget=lambda: 123,
            create_execution_context=lambda how: how,
        )
        trouble = SimpleNamespace(desc=lambda: " no such weight ")
        self.OnnxParserRefitter = lambda *_: SimpleNamespace(
            refit_from_bytes=self.refit, num_errors=1, get_error=lambda _: trouble
        )
        self.Refitter = lambda *_: SimpleNamespace(refit_cuda_engine=lambda: True)
        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: self.engine)

    def refit(self, graph: bytes, path: str) -> bool:
        self.asked.append(f"refit with {path}")
        assert b"write_indices" in graph
        return self.refits


def test_what_loading_an_engine_asks_of_tensorrt(bundle: Bundle, monkeypatch):
    """Over a *fake* TensorRT: weights that were left out come back, weights that may stream do."""
    built = open_engine(bundle, next((bundle.folder / "engines").iterdir()))
    memory = SimpleNamespace(name="A GPU", compute_capability="9.0")
    monkeypatch.setattr("cla_export.engines.tensorrt_runtime.CudaMemory", lambda: memory)
    monkeypatch.setattr("cla_export.plugin.tensorrt.register", lambda _: None)

    def load_with(fake: FakeTensorRT, **options) -> Loaded:
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        changed = {**built.record, "flavour": "tensorrt", "gpu": "A GPU"}
        changed |= {"versions": {"tensorrt": "11.0"}}
        changed["options"] = {**built.record["options"], "compute_capabilities": [], **options}
        return load_engine(bundle, replace(built, record=changed))

    fake = FakeTensorRT("11.0")
    assert load_with(fake).new_context(True) == "managed by us"
    assert not fake.asked
    assert not hasattr(fake.engine, "weight_streaming_budget_v2")
    load_with(fake, strip=True, refit=True, weight_streaming=True)
    assert fake.asked == [f"refit with {bundle.graph}"]
    assert fake.engine.weight_streaming_budget_v2 == 123
    with pytest.raises(BundleError, match=r"without weights.*no such weight.*--strip --force"):
        load_with(FakeTensorRT("11.0", refits=False), strip=True)
    with pytest.raises(BundleError, match=r"built with tensorrt 11.0, and 11.1 is installed"):
        load_with(FakeTensorRT("11.1"))
    load_with(FakeTensorRT("11.1"), version_compatible=True)
    fake.engine = None
    with pytest.raises(BundleError, match="does not load this engine on A GPU"):
        load_with(fake)


def test_parity_over_a_simulated_engine(make, bundle: Bundle, portable: Bundle, tmp_path: Path):
    report = compare_bundle(bundle, executor=make())
    assert report.passed, report.faults
    assert report.backend == "tensorrt-rtx"
    assert report.tools["tensorrt-rtx"].startswith("1.")
    assert "positions from 48 to" in report.notes[0]
    assert "the engine was not built for them" in report.notes[0]
    assert any("an engine shows no values" in note for note in report.notes)
    names = {case.name for case in report.cases}
    report = compare_bundle(bundle, executor=make(simulate(portable, late=-1)))
    assert not report.passed
    failed = {result.output for result in report.tensors if not result.passed}
    assert "logits" in failed
    report = compare_bundle(bundle, executor=make(slots=1))
    assert report.passed, report.faults
    missing = names - {case.name for case in report.cases}
    (note,) = (note for note in report.notes if "slots are too few" in note)
    assert missing == set(note.partition("for them: ")[2].split(", "))
    with pytest.raises(BadInput, match="shows no values inside"):
        compare_bundle(bundle, executor=make(), debug_dir=tmp_path / "d")


@pytest.mark.skipif(bool(nvidia_gpus()[0]), reason="asks a machine that has no GPU")
def test_without_a_gpu_nothing_is_green(bundle: Bundle, zoo: Zoo):
    for command in (["parity"], ["parity", "--target", "tensorrt-rtx"]):
        result = CliRunner().invoke(app, [*command, str(bundle.folder)])
        assert isinstance(result.exception, MissingEnvironment)
        assert result.exception.exit_code == 3
        assert "no GPU to run on" in str(result.exception)
    with pytest.raises(MissingEnvironment, match="no GPU to run on"):
        load(bundle)
    with pytest.raises(
        MissingEnvironment, match=r"tensorrt is not installed; pip install 'cla-export\[tensorrt\]'"
    ):
        compare_bundle(bundle, target="tensorrt")
    with pytest.raises(BadInput, match="exported for tensorrt-rtx, which onnxruntime does not run"):
        load(bundle, backend="onnxruntime")
    with pytest.raises(BadInput, match="exported for onnxruntime, which tensorrt does not run"):
        compare_bundle(zoo.bundle(**MIXED), target="tensorrt")
    with pytest.raises(BadInput, match="target is torch, which is what a bundle is compared with"):
        compare_bundle(zoo.bundle(**MIXED), target="torch")
    with pytest.raises(BadInput, match="onnxruntime takes no engine"):
        compare_bundle(zoo.bundle(**MIXED), engine=bundle.folder)


def test_the_engine_to_run_can_be_named(bundle: Bundle, portable: Bundle, tmp_path: Path):
    folder = next((bundle.folder / "engines").iterdir())
    for name in ("sm89", "sm120"):
        shutil.copytree(folder, tmp_path / f"engines/{name}-tensorrt-rtx-float16")
    two = replace(bundle, folder=tmp_path)
    with pytest.raises(BundleError, match=r"2 engines for tensorrt-rtx .*name one: --engine "):
        find_engine(two)
    with pytest.raises(BundleError, match="no engine for tensorrt;"):
        find_engine(two, "tensorrt")
    with pytest.raises(BadInput, match="an engine for tensorrt-rtx, not for tensorrt"):
        TensorRTExecutor(bundle, folder, flavour="tensorrt", load=simulate(portable))
