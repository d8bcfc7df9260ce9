"""rewrite: a stateless ONNX graph that somebody else traced becomes a stateful one.

    input_ids [B, S], position_ids [B, S]  ->  logits [B, S, V]

No config and no checkpoint: which layers share is what the graph says. Weights stay where they are
until the result is written. Both graphs are then run side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cla_export.errors import (
    BadInput,
    CheckFailed,
    GraphError,
    MissingEnvironment,
    RunError,
)
from cla_export.layout import KVLayout
from cla_export.lower import check_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from cla_export.rewrite.report import PassReport

_INLINE = 1024  # bytes; larger weights go to the file beside the graph
_PROMPT, _STEPS = 10, 6  # tokens of the check
_ALLOWED = {"tensor(float)": 1e-4, "tensor(float16)": 2e-2}  # of the largest logit


@dataclass(frozen=True, slots=True)
class RewrittenGraph:
    """What was written, the sharing that was found, and what came of running both graphs."""

    path: Path
    target: str
    layout: KVLayout
    attention: tuple[str, ...]  # operator of each group
    reports: "tuple[PassReport, ...]"
    error: float | None  # largest difference of a logit; None: not run
    largest: float | None  # logit

    def to_json(self) -> dict[str, object]:
        """As --json prints it."""
        return {
            "path": str(self.path),
            "target": self.target,
            "kv_layout": self.layout.to_json(),
            "attention": list(self.attention),
            "passes": {report.name: report.fired for report in self.reports},
            "error": self.error,
            "largest": self.largest,
        }


def rewrite_graph(
    source: Path | str,
    dest: Path | str,
    *,
    target: str = "onnxruntime",
    check: bool = True,
    force: bool = False,
) -> RewrittenGraph:
    """Rewrite an ONNX file; weights go to `DEST.data` beside it.

    Args:
        source: a stateless graph, weights inside it or in files beside it.
        dest: file to write; refused if it exists, unless `force`.
        target: what it is lowered for. TensorRT's graphs run nowhere here, so for them the check
            runs the portable one.
        force: replace an existing file.
        check: run a prompt and some steps through both graphs in ONNX Runtime.

    Raises:
        BadInput: the source cannot be read, or the destination is in the way.
        GraphError: the graph cannot be understood; the message names the node.
        CheckFailed: both graphs ran, and differ. Nothing is written.
        RunError: ONNX Runtime does not open or run one of them. Nothing is written.
    """
    import onnx_ir as ir

    from cla_export.lower import lower
    from cla_export.rewrite import rewrite
    from cla_export.stateless_reading import read_stateless

    source, dest = Path(source), Path(dest)
    check_target(target)
    if dest.exists() and not force:
        raise BadInput(f"{dest}: exists already; pass --force to replace it")
    model, weights = read_stateless(source)
    done = rewrite(model)
    lowered = lower(target, done.model, done.layout)
    dest.parent.mkdir(parents=True, exist_ok=True)
    error = largest = None
    with TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as scratch:
        made = Path(scratch) / dest.name
        _attach(lowered.model, weights, source)
        ir.save(
            lowered.model, made, external_data=f"{dest.name}.data", size_threshold_bytes=_INLINE
        )
        if check:
            runnable = made
            if target.startswith("tensorrt"):
                runnable = Path(scratch) / "portable.onnx"
                portable = lower("portable", done.model, done.layout).model
                _attach(portable, weights, source)
                ir.save(portable, runnable, external_data="portable.data")
            error, largest = _compare(source, runnable)
        for path in (made, made.with_name(f"{dest.name}.data")):
            if path.exists():
                path.replace(dest.with_name(path.name))
    return RewrittenGraph(
        dest, target, done.layout, lowered.attention, done.reports, error, largest
    )


def _attach(model: "ir.Model", weights: "dict[str, ir.TensorProtocol]", source: Path) -> None:
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            if name not in weights:
                raise GraphError(f"{source}: initialiser {name} has no value")
            value.const_value = weights[name]


def _compare(source: Path, made: Path) -> tuple[float, float]:
    """Run a prompt and some steps through both; the largest difference, and the largest logit."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingEnvironment(
            f"onnxruntime, which runs both graphs, is not installed ({error}); pip install "
            "'cla-export[cpu]', or pass --no-check"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = []
    for path in (source, made):
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exception types derive from it alone
            raise RunError(
                f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot open it, so it cannot "
                f"be checked; pass --no-check to leave that out: {error}"
            ) from error
        sessions.append(session)
    before, after = sessions
    (logits,) = (value for value in before.get_outputs() if value.name == "logits")
    vocab = logits.shape[-1]
    if logits.type not in _ALLOWED or not isinstance(vocab, int):
        raise RunError(
            f"{source.name}: logits are {logits.type} {logits.shape}, which is not checked (floats "
            "of 32 or 16 bits over a constant vocabulary are); pass --no-check to leave that out"
        )
    try:
        return _run_both(before, after, vocab, _ALLOWED[logits.type])
    except CheckFailed:
        raise
    except Exception as error:  # ONNX Runtime's own exception types derive from it alone
        raise RunError(
            f"ONNX Runtime {onnxruntime.__version__} failed to run {_PROMPT + _STEPS} tokens "
            f"through {source.name} and what was made of it: {error}"
        ) from error


def _run_both(before: Any, after: Any, vocab: int, share: float) -> tuple[float, float]:  # noqa: ANN401
    tokens = np.random.default_rng(0).integers(0, vocab, (1, _PROMPT + _STEPS))
    positions = np.arange(tokens.shape[1])[None]
    (expected,) = before.run(["logits"], {"input_ids": tokens, "position_ids": positions})
    run = _stateful(after, tokens.shape[1] + 1)
    got = [run(tokens[:, :_PROMPT], 0)]
    got += [run(tokens[:, at : at + 1], at) for at in range(_PROMPT, tokens.shape[1])]
    expected = expected.astype(np.float32)
    off = float(np.abs(np.concatenate(got, 1) - expected).max())
    largest = float(np.abs(expected).max())
    if not off <= share * largest:
        raise CheckFailed(
            f"the rewritten graph differs from the stateless one: logits by up to {off:.1e}, "
            f"allowed {share * largest:.1e} ({share:g} of the largest); nothing was written"
        )
    return off, largest


def _stateful(
    session: Any,  # noqa: ANN401
    capacity: int,
) -> Callable[[NDArray[np.int64], int], NDArray[np.float32]]:
    """One row, run over caches that it keeps: (tokens [1, S], how many came before) -> logits."""
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = {
        value.name: np.zeros((1, value.shape[1], capacity, value.shape[3]), types[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    named = {value.name for value in session.get_inputs()}
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]

    def run(tokens: NDArray[np.int64], held: int) -> NDArray[np.float32]:
        total = held + tokens.shape[1]
        lengths = {
            "attention_mask": np.ones((1, total), np.int64),
            "write_indices": np.array([held]),
            "kv_lengths": np.array([total]),
        }
        feeds = {name: value for name, value in lengths.items() if name in named}
        logits, *presents = session.run(outputs, {"input_ids": tokens, **feeds, **caches})
        caches.update(zip(caches, presents, strict=True))
        made: NDArray[np.float32] = logits.astype(np.float32)
        return made

    return run
