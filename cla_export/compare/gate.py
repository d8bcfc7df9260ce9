"""parity: run the cases on both sides, compare with polygraphy, generate, score, conclude."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from polygraphy.comparator import Comparator, CompareFunc
from polygraphy.logger import G_LOGGER

from cla_export.bundle import CPU_GRAPH, Bundle, Progress, open_bundle
from cla_export.compare.baseline import read_baseline, regressions
from cla_export.compare.cases import Case, Setup, case_length, make_setups, shape_of
from cla_export.compare.debug import call_of_interest, check_debug_dir, write_call
from cla_export.compare.greedy import compare_greedy
from cla_export.compare.int8_caches import find_scales, made_up
from cla_export.compare.marks import Call, MarkedExecutor
from cla_export.compare.perplexity import compare_perplexity, perplexity
from cla_export.compare.reading import read_bundle, use_quantized
from cla_export.compare.reference import GroupKV, Reference
from cla_export.compare.replay import (
    Difference,
    differences,
    first_divergence,
    layer_map,
    open_marked,
    run_marked,
)
from cla_export.compare.report import ParityReport, TensorResult
from cla_export.compare.results import tensor_result
from cla_export.compare.routing import routed
from cla_export.compare.runners import ExecutorRunner, TorchRunner, fill_with_garbage
from cla_export.compare.thresholds import Threshold, thresholds_of
from cla_export.engines import gpu_graph
from cla_export.engines.executor import Executor
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor, graph_of
from cla_export.engines.opening import backend_of, open_executor
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.environment import processor
from cla_export.errors import BadInput, BundleError, RunError
from cla_export.models.checkpoint import Checkpoint, load_model, open_checkpoint
from cla_export.models.decoder import Decoder
from cla_export.tokenizer import SEED, token_stream

_TOOLS = ("torch", "onnxruntime", "onnx", "polygraphy", "numpy")
_HELD = 64  # tokens whose keys and values stand in for a long context's, over and over
_ONE_THREAD = 2**24  # parameters
_ON_GPU = 8192  # tokens a slot holds there, at most
_SLOTS = 8  # there: more than any case needs
_INT8 = 8  # bits of experts' weights whose products round what they multiply
_SHOWN = "decode"  # the case whose layers are shown where nothing fails
_SPELT = "the module spells its attention out, where PyTorch has no keys and values to show"


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def compare_bundle(
    bundle: Bundle | Path | str,
    reference: Path | str | None = None,
    *,
    text: Path | None = None,
    seed: int = SEED,
    threads: int | None = None,
    baseline: Path | None = None,
    debug_dir: Path | None = None,
    target: str | None = None,
    engine: Path | None = None,
    module: str | None = None,
    executor: Executor | None = None,
    onnxruntime: type[OnnxRuntimeExecutor] = OnnxRuntimeExecutor,
    progress: Progress = _silent,
) -> ParityReport:
    """Compare a bundle with the PyTorch model it was exported from.

    Args:
        bundle: the bundle, or its folder (verified before use).
        reference: the model folder; None takes the one it was exported from.
        text: text for prompts and perplexity; None takes the bundle's heldout.txt, else random ids.
        seed: of those random ids, and of the shapes of the cases.
        threads: intra-operator threads of the runtime.
        baseline: parity.json of an earlier run; what was better then is a regression.
        debug_dir: folder to write the first failing call to, with the commands that run it again.
        target: what runs the bundle: `onnxruntime`, `tensorrt` or `tensorrt-rtx`; None: what it was
            exported for.
        engine: folder of a TensorRT engine; None: the only one that the bundle has.
        module: `package.module:factory` that makes the reference, where it was exported with one.
        executor: run all cases with this, in place of what `target` names.
        onnxruntime: ONNX Runtime's executor, in the first divergence's replay too.
        progress: called with (what, done, of).

    Raises:
        BundleError: the reference is gone or is another model.
        BadInput: the text, the baseline or the target cannot be used.
        MissingEnvironment: the target is not installed, or has no GPU to run on.

    A breach is no exception, and neither is a graph that the runtime refuses: read `passed` of the
    report.
    """
    began = perf_counter()
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    stored = None if baseline is None else read_baseline(baseline)
    backend = backend_of(bundle, target)
    if backend == "torch":
        raise BadInput("target is torch, which is what a bundle is compared with; name a runtime")
    if executor is None:
        executor = _executor_of(bundle, backend, target, engine)
    most = bundle.max_positions
    positions = most if executor is None else min(most, executor.capacity)
    folder = Path(reference) if reference is not None else bundle.source
    checkpoint = _checkpoint(bundle, folder, bundle.module_named(module))
    whole_rows = checkpoint.spec.spelt_attention
    if debug_dir is not None:
        _check_inside(debug_dir, executor, whole_rows=whole_rows)
    stream, origin = token_stream(bundle.folder, bundle.vocab_size, text, seed)
    weights = bundle.quantization
    arithmetic, threshold, inside = thresholds_of(
        bundle.dtype, weights.name if weights else None, bundle.cache_dtype
    )
    report = ParityReport(
        bundle=str(bundle.folder),
        reference=str(folder),
        target=bundle.target,
        dtype=bundle.dtype,
        arithmetic=arithmetic,
        backend="onnxruntime" if executor is None else executor.backend,
        tokens=origin,
        seed=seed,
        length=case_length(bundle.layout, positions),
        kv_layout=bundle.layout.to_json(),
        tools=_tools(executor),
        machine=_machine(threads),
    )
    model = load_model(checkpoint)
    unquantized = None
    if weights is not None:
        progress("read the text without quantisation", 0, 1)
        plain = Reference.of(model, None, None).exact
        unquantized = perplexity(plain.logits, stream, report.length)
    with _torch_threads(model):
        rounds = executor is None or executor.rounds_activations
        sides = _sides(bundle, checkpoint, model, stream, report, rounds=rounds)
        size = sum(parameter.numel() for parameter in model.parameters())
        setups = make_setups(bundle, positions, stream, seed, size, made_up=not whole_rows)
        held = _made_up(sides, stream, min(_HELD, positions), bundle.dtype)
        run = _Run(
            bundle,
            sides,
            threshold,
            inside,
            held,
            setups,
            onnxruntime,
            executor,
            threads,
            report,
            progress,
        )
        run.compare()
        run.generate(stream, unquantized)
        run.look_inside(debug_dir)
        if executor is None and bundle.cpu_graph is not None:
            if graph_of(bundle)[0] == bundle.cpu_graph:
                again = replace(run, stock=False)
                again.compare()
                again.look_inside(None)
            else:
                report.notes.append(
                    f"{CPU_GRAPH} was not run: its operators cannot be compiled here (`cla-export "
                    "doctor` says why), so nothing else runs it here either"
                )
    if stored is not None and baseline is not None:
        report.baseline = str(baseline)
        report.regressions += regressions(report, stored, baseline)
    report.seconds = perf_counter() - began
    progress("done", 1, 1)
    return report


def _executor_of(
    bundle: Bundle, backend: str, target: str | None, engine: Path | None
) -> Executor | None:
    """What runs all cases; None for ONNX Runtime on a CPU, which each step opens anew."""
    if backend != "onnxruntime" or engine is not None:
        return open_executor(bundle, target, engine=engine)
    if not gpu_graph.takes(bundle):
        return None
    most = min(bundle.max_positions, _ON_GPU)
    return open_executor(bundle, target, capacity=most, slots=_SLOTS)


@dataclass(frozen=True, slots=True)
class _Run:
    """One comparison: everything its steps have in common. Each adds to the report.

    A step opens its own executor and lets it go, since weights are large, unless it is given one
    for all. What a runtime refuses is a finding too: the report says so, and whatever else can run
    does. The graph for CPUs is another run, whose cases are named after it.
    """

    bundle: Bundle
    sides: Reference
    threshold: Threshold
    inside: Threshold  # of what layers make, where caches are given
    held: GroupKV
    setups: tuple[Setup, Setup]  # near and far
    onnxruntime: type[OnnxRuntimeExecutor]
    executor: Executor | None  # runs all cases, if given
    threads: int | None
    report: ParityReport
    progress: Progress
    stock: bool = True  # run model.onnx, not the graph for CPUs

    @property
    def whole_rows(self) -> bool:
        """Whether PyTorch's side has logits of whole rows alone."""
        return self.sides.exact.model.spec.spelt_attention

    def compare(self) -> None:
        """All cases, on both sides."""
        if self.stock and self.whole_rows:
            self.report.notes.append(
                f"{_SPELT}: logits were compared with it over whole rows, caches and layers by "
                "what they make of the logits alone"
            )
        if self.stock:
            why = "PyTorch runs whole rows up to them" if self.whole_rows else None
            reached = self.setups[1].capacity
            self.report.notes += _unreached(self.bundle, reached, self.executor, why)
        for setup in self.setups:
            if not setup.cases:
                continue
            if self.executor is not None:
                self.report.notes += _leave_out(setup, self.executor.slots)
            if self.stock:
                self.report.cases += [shape_of(case) for case in setup.cases]
            with self._faults():
                executor = self._open(setup)
                for index, case in enumerate(setup.cases):
                    self.progress(f"case {self._name(case)}", index, len(setup.cases))
                    with self._faults(case):
                        self.report.tensors += self._compare_case(case, executor)

    def generate(self, stream: Sequence[int], unquantized: float | None) -> None:
        """Greedy generation, and perplexity."""
        exact, report = self.sides.exact, self.report
        with self._faults():
            executor = self._open(self.setups[0])
            self.progress("generate", 0, 1)
            logits = [r.tolerance for r in report.tensors if r.output == "logits"]
            report.greedy += compare_greedy(exact, executor, stream, 2 * max(logits, default=0.0))
            limit = self.threshold.perplexity
            score = compare_perplexity(exact, executor, stream, report.tokens, limit)
            report.perplexity = replace(score, unquantized=unquantized)

    def look_inside(self, debug_dir: Path | None) -> None:
        """Replay every case with every layer in view; report the first that fails, or one."""
        report = self.report
        if self.whole_rows:
            return
        if self.executor is not None:
            report.notes.append(
                f"{self.executor.backend}: an engine shows no values inside, so caches and logits "
                "were compared, and no layer by itself"
            )
            return
        failed = {result.case for result in report.tensors if not result.passed}
        wrong: tuple[Setup, Case] | None = None
        for setup in self.setups:
            with self._faults():
                executor = open_marked(self.bundle, setup, self.onnxruntime, stock=self.stock)
                for index, case in enumerate(setup.cases):
                    self.progress(f"layers of case {self._name(case)}", index, len(setup.cases))
                    found, calls = self._steps(executor, case)
                    divergence = first_divergence(found, self.bundle.layout, self._name(case))
                    largest = max((difference.share for difference in found), default=0.0)
                    report.inside = max(largest, report.inside or 0.0)
                    bad = divergence is not None or self._name(case) in failed
                    if wrong is None and (bad or case.name == _SHOWN) and not self._blamed():
                        report.layer_map = layer_map(found, calls, self._name(case))
                    if bad and report.divergence is None:
                        report.divergence, wrong = divergence, wrong or (setup, case)
                    if report.divergence is not None:
                        break
            if report.divergence is not None:
                break
        if wrong is not None and debug_dir is not None:
            with self._faults():
                self._leave(debug_dir, *wrong)

    def _blamed(self) -> bool:
        """Whether an earlier run has a layer to blame, whose map is to stay."""
        return not self.stock and self.report.divergence is not None

    def _name(self, case: Case) -> str:
        """The case's name; those that ran the graph for CPUs say so."""
        return case.name if self.stock else f"{case.name} (cpu)"

    def _steps(self, executor: MarkedExecutor, case: Case) -> tuple[list[Difference], list[Call]]:
        calls = run_marked(executor, case, self.held)
        layout, sides = self.bundle.layout, self.sides
        return list(differences(calls, layout, sides, self.inside, case, self.held)), calls

    def _leave(self, folder: Path, setup: Setup, case: Case) -> None:
        """Write the call that went wrong to a folder."""
        bundle, report = self.bundle, self.report
        calls = run_marked(open_marked(bundle, setup, self.onnxruntime), case, self.held)
        number = call_of_interest(report, case, calls)
        executor = open_marked(bundle, setup, self.onnxruntime, record=number)
        run_marked(executor, case, self.held)
        limits = {r.output: r.tolerance for r in report.tensors if r.case == case.name}
        report.debug = write_call(
            folder, bundle, executor, self.sides, self.threshold, case, self.held, limits
        )

    def _open(self, setup: Setup) -> Executor:
        executor = self.executor or routed(self.onnxruntime, self.bundle)(
            self.bundle,
            capacity=setup.capacity,
            slots=setup.slots,
            threads=self.threads,
            stock=self.stock,
        )
        fill_with_garbage(executor)
        return executor

    def _compare_case(self, case: Case, executor: Executor) -> list[TensorResult]:
        first = ExecutorRunner(executor, self.held, caches=not self.whole_rows)
        runners = [first, TorchRunner(self.sides.exact, self.held, first.routes)]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            runs = Comparator.run(runners, data_loader=[case.feed])
            got, expected = (iterations[0] for _, iterations in runs.items())
            natives = [
                TorchRunner(side, self.held, first.routes).run_case(case.feed)
                for side in self.sides.yardstick
            ]
            keys = case.positions if case.positions > self.setups[0].capacity else 0
            allowed = {
                name: self.threshold.of(exact, [native[name] for native in natives], keys)
                for name, exact in expected.items()
            }
            compared = Comparator.compare_accuracy(
                runs, compare_func=CompareFunc.simple(atol=allowed, rtol=0.0)
            )
        (outcome,) = next(iter(compared[0].values()))
        results = []
        for name, exact in expected.items():
            limits = allowed[name], self.threshold.mean_of(exact, natives[0][name], keys)
            within = bool(outcome[name])
            result = tensor_result(case, name, exact, got[name], within, limits)
            results.append(replace(result, case=self._name(case)))
        return results

    @contextmanager
    def _faults(self, case: Case | None = None) -> Iterator[None]:
        try:
            yield
        except RunError as error:
            known = any(str(error) in fault for fault in self.report.faults)
            where = "" if case is None else f"case {self._name(case)}: "
            self.report.faults += [] if known else [f"{where}{error}"]


def _sides(
    bundle: Bundle,
    checkpoint: Checkpoint,
    model: Decoder,
    stream: Sequence[int],
    report: ParityReport,
    *,
    rounds: bool,
) -> Reference:
    """Both sides, with the weights that the bundle's stand for; faults go into the report.

    `rounds`: whatever runs it rounds activations to int8 before products with quantised weights.
    """
    reading = read_bundle(bundle, model)
    report.faults += reading.faults
    use_quantized(model, reading)
    rounded = None
    if bundle.dtype != "float32":
        rounded = load_model(checkpoint, getattr(torch, bundle.dtype))
        use_quantized(rounded, reading)
    scales, faults = find_scales(bundle, model, stream)
    report.faults += faults
    how = bundle.quantization if rounds else None
    experts = bundle.manifest.get("experts")
    quantized = isinstance(experts, dict) and experts["operator"] == "QMoE"
    rounds_experts = quantized and how is not None and how.bits == _INT8
    return Reference.of(model, rounded, how, scales, rounds_experts=rounds_experts)


@contextmanager
def _torch_threads(model: Decoder) -> Iterator[None]:
    """One thread for a model so small that several only wait for each other, on a busy machine."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < _ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_inside(debug_dir: Path, executor: Executor | None, *, whole_rows: bool) -> None:
    """Refuse --debug-dir where one side shows nothing inside, or its folder is in use."""
    check_debug_dir(debug_dir)
    if executor is not None:
        raise BadInput(
            f"--debug-dir: {executor.backend} shows no values inside; export the model for "
            "onnxruntime too and run parity there, which finds what the graph has wrong"
        )
    if whole_rows:
        raise BadInput(f"--debug-dir: {_SPELT}, so there is nothing inside to compare with")


def _checkpoint(bundle: Bundle, folder: Path, module: str | None) -> Checkpoint:
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: the model folder that {bundle.folder} was exported from is not there; pass "
            "it with --reference"
        )
    checkpoint = open_checkpoint(folder, module, bundle.layout)
    if checkpoint.spec.layout != bundle.layout:
        raise BundleError(
            f"{folder}: its KV layout ({checkpoint.spec.layout.describe()}) is not the bundle's "
            f"({bundle.layout.describe()}); it is another model"
        )
    return checkpoint


def _made_up(sides: Reference, stream: Sequence[int], count: int, dtype: str) -> GroupKV:
    """Keys and values of some tokens, as the bundle's dtype holds them, in float32; see `Side`."""
    tokens = np.resize(np.asarray(stream, np.int64), count)
    kind = getattr(torch, dtype)
    groups = sides.exact.forward(tokens)[1]
    if sides.native.scales is not None:
        return made_up(groups, sides.native.scales)

    def stored(part: np.ndarray) -> np.ndarray:
        return torch.from_numpy(part).to(kind).float().numpy()

    return [(stored(key), stored(value)) for key, value in groups]


def _tools(executor: Executor | None) -> dict[str, str]:
    """Versions of what took part."""
    found = {name: version(name) for name in _TOOLS}
    if executor is not None and executor.backend in FLAVOURS:
        found[executor.backend] = str(import_module(FLAVOURS[executor.backend]).__version__)
    return found


def _leave_out(setup: Setup, slots: int) -> Iterator[str]:
    """Take away the cases that need more slots than there are; a note that says so."""
    left = [case.name for case in setup.cases if case.slots > slots]
    setup.cases[:] = [case for case in setup.cases if case.slots <= slots]
    if left:
        yield f"not run, since {slots} slots are too few for them: {', '.join(left)}"


def _unreached(
    bundle: Bundle, reached: int, executor: Executor | None, why: str | None
) -> Iterator[str]:
    """What no case gets to, and why, where that is not the size of caches or of an engine."""
    if reached < bundle.max_positions:
        why = why or "caches that reach them would be large"
        if executor is not None and reached == executor.capacity:
            why = "the engine was not built for them"
        yield f"positions from {reached:,} to {bundle.max_positions - 1:,} were not run: {why}"
    for window in sorted({w for w in bundle.layout.window if w is not None and w >= reached}):
        yield f"no case reaches past the window of {window}"


def _machine(threads: int | None) -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": "the runtime's choice" if threads is None else str(threads),
    }
