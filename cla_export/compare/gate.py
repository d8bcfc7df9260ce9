"""parity: run the cases on both sides, compare with polygraphy, generate, score, conclude."""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, CompareFunc
from polygraphy.logger import G_LOGGER

from cla_export.bundle import Bundle, Progress, open_bundle
from cla_export.compare.cases import SLOTS, Case, case_length, make_cases
from cla_export.compare.locate import locate
from cla_export.compare.metrics import compare_logits, cosine, log_softmax, profile
from cla_export.compare.reading import graph_faults
from cla_export.compare.report import (
    GreedyResult,
    ParityReport,
    PerplexityResult,
    TensorResult,
)
from cla_export.compare.runners import ExecutorRunner, TorchRunner, fill_with_garbage
from cla_export.compare.text import SEED, token_stream
from cla_export.compare.thresholds import GREEDY_TOKENS, THRESHOLDS, Threshold
from cla_export.engines.executor import Executor
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BundleError
from cla_export.models.checkpoint import Checkpoint, load_model, open_checkpoint
from cla_export.models.cla import ClaDecoder

_PROMPT = 12  # tokens of each prompt for free-running generation
_SCORED = 2048  # tokens of the text that perplexity is taken over, at most
_TOOLS = ("torch", "onnxruntime", "onnx", "polygraphy", "numpy")


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def compare_bundle(
    bundle: Bundle | Path | str,
    reference: Path | str | None = None,
    *,
    text: Path | None = None,
    seed: int = SEED,
    threads: int | None = None,
    engine: type[OnnxRuntimeExecutor] = OnnxRuntimeExecutor,
    progress: Progress = _silent,
) -> ParityReport:
    """Compare a bundle with the PyTorch model it was exported from.

    Args:
        bundle: the bundle, or its folder (verified before use).
        reference: the model folder; None takes the one it was exported from.
        text: text for prompts and perplexity; None takes the bundle's heldout.txt, else random ids.
        seed: of those random ids.
        threads: intra-operator threads of the runtime.
        engine: the executor to run the bundle with, in the first divergence's replay too.
        progress: called with (what, done, of).

    Raises:
        BundleError: the reference is gone or is another model. A breach is no exception: read
            `passed` of the report.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    folder = Path(reference) if reference is not None else bundle.source
    checkpoint = _reference(bundle, folder)
    model = load_model(checkpoint)
    stream, origin = token_stream(bundle, text, seed)
    length = case_length(bundle.layout, bundle.max_positions)
    capacity = length  # filled to the last place by some cases, with room behind the rest
    executor = engine(bundle, capacity=capacity, slots=SLOTS, threads=threads)
    threshold = THRESHOLDS[bundle.dtype]
    report = ParityReport(
        bundle=str(bundle.folder),
        reference=str(folder),
        target=bundle.target,
        dtype=bundle.dtype,
        backend="onnxruntime",
        tokens=origin,
        length=length,
        kv_layout=bundle.layout.to_json(),
        graph_faults=graph_faults(bundle, model),
        tools={name: version(name) for name in _TOOLS},
    )
    for window in sorted({w for w in bundle.layout.window if w is not None and w >= length}):
        report.notes.append(f"rows of {length} tokens do not reach past the window of {window}")
    cases = make_cases(length, stream)
    fill_with_garbage(executor)
    rounded = None  # PyTorch in the bundle's dtype, to measure what rounding alone costs
    if threshold.factor:
        rounded = load_model(checkpoint, getattr(torch, bundle.dtype))
    report.tensors += _compare_cases(cases, model, rounded, executor, threshold, progress)
    tie = 2 * max(result.tolerance for result in report.tensors if result.output == "logits")
    report.greedy += _compare_greedy(model, executor, stream, tie, progress)
    report.perplexity = _compare_perplexity(model, executor, stream, origin, threshold)
    if not report.passed:
        progress("locate the first divergence", 2, 3)
        failed = next((r.case for r in report.tensors if not r.passed), cases[0].name)
        case = next(case for case in cases if case.name == failed)
        report.divergence = locate(bundle, model, rounded, case, threshold, capacity, engine)
    progress("done", 3, 3)
    return report


def _reference(bundle: Bundle, folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: the model folder that {bundle.folder} was exported from is not there; pass "
            "it with --reference"
        )
    checkpoint = open_checkpoint(folder)
    if checkpoint.spec.layout != bundle.layout:
        raise BundleError(
            f"{folder}: its KV layout ({checkpoint.spec.layout.describe()}) is not the bundle's "
            f"({bundle.layout.describe()}); it is another model"
        )
    return checkpoint


def _compare_cases(
    cases: list[Case],
    model: ClaDecoder,
    rounded: ClaDecoder | None,
    executor: Executor,
    threshold: Threshold,
    progress: Progress,
) -> list[TensorResult]:
    results = []
    for index, case in enumerate(cases):
        progress(f"case {case.name}", index, len(cases))
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            runs = Comparator.run(
                [TorchRunner(model), ExecutorRunner(executor, "bundle")], data_loader=[case.feed]
            )
            expected, got = (iterations[0] for _, iterations in runs.items())
            noisy = TorchRunner(rounded).run_case(case.feed) if rounded is not None else {}
            tolerance = {
                name: threshold.of(array, noisy.get(name)) for name, array in expected.items()
            }
            compared = Comparator.compare_accuracy(
                runs, compare_func=CompareFunc.simple(atol=tolerance, rtol=0.0)
            )
        (outcome,) = next(iter(compared[0].values()))
        for name, array in expected.items():
            allowed = tolerance[name], threshold.mean_of(array, noisy.get(name))
            results.append(
                _tensor_result(case, name, array, got[name], bool(outcome[name]), allowed)
            )
    return results


def _tensor_result(
    case: Case,
    name: str,
    expected: NDArray[np.float32],
    got: NDArray[np.float32],
    passed: bool,
    allowed: tuple[float, float],
) -> TensorResult:
    error = np.abs(got.astype(np.float64) - expected)
    error[~np.isfinite(error)] = math.inf
    worst = int(np.unravel_index(int(error.argmax()), error.shape)[0])
    is_logits = name == "logits"
    starts = case.feed["logits_from"] if is_logits else np.zeros_like(case.feed["prompts"])
    ends = np.cumsum(case.feed["prompts"] + case.feed["steps"] - starts)
    row = int(np.searchsorted(ends, worst, side="right"))
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    tolerance, mean_tolerance = allowed
    return TensorResult(
        case=case.name,
        output=name,
        group=None if is_logits else int(name.split(".")[1]),
        passed=passed and float(error.mean()) <= mean_tolerance,  # an infinite one is not
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        mean_tolerance=mean_tolerance,
        rms=rms,
        tolerance=tolerance,
        row=row,
        position=worst - (int(ends[row - 1]) if row else 0) + int(starts[row]),
        cosine=cosine(expected, got),
        max_relative=float(error.max()) / rms if rms else math.inf,
        profile=profile(error),
        logits=compare_logits(expected, got) if is_logits else None,
    )


def _compare_greedy(
    model: ClaDecoder,
    executor: Executor,
    stream: Sequence[int],
    tie: float,
    progress: Progress,
) -> list[GreedyResult]:
    """Let the bundle generate freely; one reference pass over its text says where it would differ.

    Up to the first disagreement both have the same prefix, so this is free-running agreement.
    """
    length = max(1, min(_PROMPT, executor.capacity // 2))
    count = min(GREEDY_TOKENS, executor.capacity - length)
    results = []
    for prompt in range(3):
        progress("generate", prompt, 3)
        start = prompt * len(stream) // 3
        tokens = [int(token) for token in np.resize(np.roll(stream, -start), length)]
        logits = executor.prefill(0, tokens, 0)[-1]
        for step in range(count):
            tokens.append(int(logits.argmax()))
            if step + 1 < count:
                logits = executor.decode([0], tokens[-1:], [len(tokens) - 1])[0]
        results.append(_judge_greedy(model, prompt, tokens, length, tie))
    return results


@torch.inference_mode()
def _judge_greedy(
    model: ClaDecoder, prompt: int, tokens: list[int], length: int, tie: float
) -> GreedyResult:
    ids = torch.tensor(tokens)[None]
    reference = model(ids, torch.arange(len(tokens))[None])[0, length - 1 : -1].numpy()
    chosen = np.array(tokens[length:])
    agree = reference.argmax(-1) == chosen
    gaps = reference.max(-1) - reference[np.arange(len(chosen)), chosen]
    wrong = np.flatnonzero(~agree)
    return GreedyResult(
        prompt=prompt,
        tokens=len(chosen),
        agreeing=int(agree.sum()),
        near_ties=int((gaps[wrong] <= tie).sum()),
        first_divergence=int(wrong[0]) if len(wrong) else None,
        gap=float(gaps[wrong[0]]) if len(wrong) else None,
        passed=bool((gaps[wrong] <= tie).all()),
    )


@torch.inference_mode()
def _compare_perplexity(
    model: ClaDecoder, executor: Executor, stream: Sequence[int], origin: str, threshold: Threshold
) -> PerplexityResult:
    """Windows of the text as long as a slot; the bundle reads each in two chunks."""
    window = executor.capacity
    losses: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
    scored = np.asarray(stream[:_SCORED], np.int64)
    for start in range(0, len(scored) - 1, window):
        tokens = scored[start : start + window]
        if len(tokens) < 2:
            break
        ids = torch.from_numpy(tokens)[None]
        reference = model(ids, torch.arange(len(tokens))[None])[0].numpy()
        half = max(1, len(tokens) // 2)
        pieces = [(0, tokens[:half]), (half, tokens[half:])]
        got = [executor.prefill(0, piece.tolist(), at, keep=len(piece)) for at, piece in pieces]
        for side, logits in enumerate((reference, np.concatenate(got))):
            losses[side].append(_losses(logits[:-1], tokens[1:]))
    ours, theirs = (float(np.exp(np.concatenate(side).mean())) for side in (losses[1], losses[0]))
    difference = abs(ours - theirs) / theirs
    return PerplexityResult(
        text=f"{origin}, windows of {window}",
        tokens=sum(len(part) for part in losses[0]),
        reference=theirs,
        bundle=ours,
        difference=difference,
        tolerance=threshold.perplexity,
        passed=difference <= threshold.perplexity,
    )


def _losses(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihoods in nats of targets [N] under logits [N, V]."""
    losses: NDArray[np.float64] = -log_softmax(logits)[np.arange(len(targets)), targets]
    return losses
