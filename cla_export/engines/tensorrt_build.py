"""build: a bundle's graph becomes a TensorRT engine, in a process of its own.

    engines/<compute capabilities or GPU>-<flavour>-<dtype>/
        model.engine    the engine
        build.json      what it was built from and with: versions, profiles, sizes, sha256

One engine has two optimisation profiles over the same caches:

    decode    batch 1..slots, one token each
    prefill   batch 1, 1..chunk tokens

TensorRT's builder can crash on a graph; the process that dies is then not the user's, and the
message names the last node that was parsed. Flavours: `tensorrt` builds for the GPU of the machine;
`tensorrt-rtx` builds for given compute capabilities on any machine, without a GPU too.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

from cla_export import __version__
from cla_export.bundle import (
    BUILD_RECORD as RECORD,
)
from cla_export.bundle import (
    Bundle,
    Progress,
    engine_folders,
    new_folder,
    open_bundle,
    sha256,
    write_json,
)
from cla_export.engines.rtx_wheel import rtx_library, rtx_link
from cla_export.environment import nvidia_gpus
from cla_export.errors import BadInput, BundleError, CheckFailed, MissingEnvironment
from cla_export.layout import DTYPES

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # flavour -> Python module
ENGINE = "model.engine"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # of TensorRT-RTX 1.7
_SCHEMA = 1
_CAPACITY, _CHUNK = 2048, 512  # where not asked for


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What an engine is built for."""

    flavour: str
    capacity: int  # tokens a slot holds
    chunk: int  # tokens of a prefill call, at most
    slots: int = 8
    compute_capabilities: tuple[str, ...] = ()  # tensorrt-rtx; none: the GPU here
    refit: bool = False
    strip: bool = False  # leave weights out; needs refit
    weight_streaming: bool = False
    version_compatible: bool = False
    timing_cache: str | None = None  # file, read and updated


@dataclass(frozen=True, slots=True)
class Built:
    """A finished engine."""

    folder: Path
    record: dict[str, Any]


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def build(
    bundle: Bundle | Path | str,
    *,
    flavour: str | None = None,
    precision: str | None = None,
    capacity: int | None = None,
    chunk: int | None = None,
    force: bool = False,
    progress: Progress = _silent,
    **more: Any,  # noqa: ANN401
) -> Built:
    """Build an engine from a bundle of a TensorRT target, into the bundle's engines/ folder.

    Args:
        bundle: an opened bundle, or its folder (verified before use).
        flavour: `tensorrt` or `tensorrt-rtx`; None takes the bundle's target.
        precision: `fp32`, `fp16` or `bf16`, checked against the bundle's dtype, which decides.
        capacity: tokens a slot holds; None: all of the model's positions, 2048 at most.
        chunk: tokens of a prefill call, at most; None: 512, or the capacity if that is less.
        force: replace an engine of the same name.
        progress: called with (what, done, of).
        more: the other fields of BuildOptions.

    Raises:
        BadInput: an option or the bundle does not fit, with what to do.
        GraphError: the lint refuses the graph (see `lower.tensorrt_lint`).
        MissingEnvironment: the flavour is not installed, or there is no GPU where one is needed.
        CheckFailed: the builder refused the graph, or crashed.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    capacity = min(bundle.max_positions, _CAPACITY) if capacity is None else capacity
    options = BuildOptions(
        flavour=flavour or bundle.target,
        capacity=capacity,
        chunk=min(capacity, _CHUNK) if chunk is None else chunk,
        **more,
    )
    if precision is not None and DTYPES.get(precision) != bundle.dtype:
        raise BadInput(
            f"precision is {precision}; the bundle is {bundle.dtype}, and TensorRT keeps a graph's "
            f"dtypes. Export again with --dtype {precision}"
        )
    _check(bundle, options)
    label = _label(options)
    graph = fixed_graph(bundle, options.capacity)
    dest = bundle.folder / "engines" / f"{label}-{options.flavour}-{bundle.dtype}"
    needed = sum(path.stat().st_size for path in bundle.folder.glob("model.onnx*"))
    with new_folder(dest, force=force, needed_bytes=needed, manifest=RECORD) as folder:
        request = {
            "module": FLAVOURS[options.flavour],
            "graph": str(bundle.graph),
            "engine": str(folder / ENGINE),
            "plugins": b"ClaAttention" in graph,
            "profiles": profiles(bundle, options),
            **asdict(options),
        }
        found = _run_worker(request, graph, options, progress)
        record = {
            "schema": _SCHEMA,
            "cla_export": __version__,
            "flavour": options.flavour,
            "versions": found["versions"],
            "options": {
                **asdict(options),
                "compute_capabilities": list(options.compute_capabilities),
            },
            "gpu": gpus[0].name if (gpus := nvidia_gpus()[0]) else None,
            "dtype": bundle.dtype,
            "profiles": request["profiles"],
            "engine": {
                "bytes": (folder / ENGINE).stat().st_size,
                "sha256": sha256(folder / ENGINE),
            },
            "graph_sha256": graph_digest(bundle),
            "layers": found["layers"],
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
        }
        write_json(folder / RECORD, record)
    return Built(dest, record)


def graph_digest(bundle: Bundle) -> str:
    """sha256 of the graph that an engine is built from, in bundle.json beside its weights'."""
    return sha256(bundle.graph)


def profiles(bundle: Bundle, options: BuildOptions) -> dict[str, dict[str, list[list[int]]]]:
    """Profile -> input -> its smallest, usual and largest shape; logits_to_keep's are values."""
    kinds = {
        "decode": ((1, 1), (max(1, options.slots // 2), 1), (options.slots, 1)),
        "prefill": ((1, 1), (1, max(1, options.chunk // 2)), (1, options.chunk)),
    }
    return {
        name: {
            "input_ids": [[batch, length] for batch, length in sizes],
            "write_indices": [[batch] for batch, _ in sizes],
            "kv_lengths": [[batch] for batch, _ in sizes],
            "logits_to_keep": [[1], [1], [sizes[-1][1]]],
            **{
                f"past_key_values.{group.index}.{part}": [
                    [batch, group.kv_heads, options.capacity, group.head_dim] for batch, _ in sizes
                ]
                for group in bundle.layout.groups
                for part in ("key", "value")
            },
        }
        for name, sizes in kinds.items()
    }


def _label(options: BuildOptions) -> str:
    """The GPUs an engine is for: sm89+sm120, portable (TensorRT-RTX's choice), or this one's."""
    if options.flavour == "tensorrt-rtx":
        chosen = (f"sm{cc.replace('.', '')}" for cc in options.compute_capabilities)
        return "+".join(chosen) or "portable"
    gpus, note = nvidia_gpus()
    if not gpus:
        raise MissingEnvironment(
            "tensorrt builds on the kind of GPU that runs the engine, and there is none here: "
            f"{note}"
        )
    return gpu_label(gpus[0].name)


def gpu_label(name: str) -> str:
    """A GPU's name as folders have it: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _check(bundle: Bundle, options: BuildOptions) -> None:
    if options.flavour not in FLAVOURS:
        raise BadInput(
            f"target is {options.flavour!r}; an engine is built for {' or '.join(FLAVOURS)}"
        )
    if bundle.target not in FLAVOURS:
        raise BadInput(
            f"{bundle.folder}: exported for {bundle.target}; engines are built from a bundle for "
            f"TensorRT: cla-export export {bundle.source} DEST --target {options.flavour}"
        )
    for name in ("capacity", "slots", "chunk"):
        value = getattr(options, name)
        if value < 1:
            raise BadInput(f"{name} is {value}; expected at least 1")
    if options.capacity > bundle.max_positions:
        raise BadInput(
            f"capacity is {options.capacity}; the model has {bundle.max_positions} positions"
        )
    if options.chunk > options.capacity:
        raise BadInput(f"chunk is {options.chunk}; a slot holds {options.capacity} tokens")
    unknown = [cc for cc in options.compute_capabilities if cc not in RTX_CAPABILITIES]
    if options.flavour == "tensorrt" and options.compute_capabilities:
        raise BadInput(
            "compute capabilities are of tensorrt-rtx; tensorrt builds for the GPU of the machine"
        )
    if unknown:
        hopper = " (Hopper and data-centre Blackwell need --target tensorrt)"
        raise BadInput(
            f"compute capability {unknown[0]}; TensorRT-RTX builds for "
            f"{', '.join(RTX_CAPABILITIES)}{hopper}"
        )
    if options.flavour == "tensorrt-rtx":
        _check_rtx(options)
    check_installed(options.flavour)


def check_installed(flavour: str) -> None:
    """MissingEnvironment, with the extra that brings it, where a flavour's module is not there."""
    if util.find_spec(FLAVOURS[flavour]) is None:
        extra = "rtx" if flavour == "tensorrt-rtx" else flavour
        raise MissingEnvironment(f"{flavour} is not installed; pip install 'cla-export[{extra}]'")


def _check_rtx(options: BuildOptions) -> None:
    """What TensorRT-RTX 1.7 cannot do, and says in riddles."""
    if options.version_compatible:
        raise BadInput(
            "version-compatible engines need TensorRT's lean runtime, which TensorRT-RTX has not; "
            "leave --version-compatible out"
        )
    if not (options.refit or options.strip):
        return
    gpus, note = nvidia_gpus()
    if len(options.compute_capabilities) > 1:
        raise BadInput("refit and strip: TensorRT-RTX builds these for one compute capability")
    if not gpus:
        raise MissingEnvironment(
            "refit and strip: TensorRT-RTX compiles such engines on a GPU, and there is none "
            f"({note})"
        )


def fixed_graph(bundle: Bundle, capacity: int) -> bytes:
    """The bundle's graph with its capacity fixed, past the lint; weights stay outside."""
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    from cla_export.graph_names import KEEP
    from cla_export.lower.tensorrt_lint import check

    model = ir.load(bundle.graph)
    if model.functions:  # the lint reads one graph
        model = InlinePass()(model).model
    graph = model.graph
    values = (*graph.inputs, *graph.outputs, *(out for node in graph for out in node.outputs))
    for value in values:
        if value.shape is not None:
            dims = [capacity if str(dim) == "capacity" else dim for dim in value.shape]
            value.shape = ir.Shape(dims)
    check(graph)
    if KEEP in graph.initializers:  # an input with a default; TensorRT would take that for good
        graph.initializers[KEEP].const_value = None
        graph.initializers.pop(KEEP)
    return bytes(ir.to_proto(model).SerializeToString())


def _run_worker(
    request: dict[str, Any], graph: bytes, options: BuildOptions, progress: Progress
) -> dict[str, Any]:
    """Build in a child process; its last words are in the error if it dies."""
    with tempfile.TemporaryDirectory(prefix="cla-export-build-") as scratch:
        (Path(scratch) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (Path(scratch) / "model.onnx").write_bytes(graph)
        with _environment(options, Path(scratch)) as environment:
            worker = subprocess.Popen(
                [sys.executable, "-m", "cla_export.engines.tensorrt_worker", scratch],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
            )
            try:
                return _follow(worker, progress)
            finally:
                worker.kill()
                worker.wait()


def _follow(worker: "subprocess.Popen[str]", progress: Progress) -> dict[str, Any]:
    last = {"node": "", "phase": ""}
    complaints: list[str] = []
    assert worker.stdout is not None and worker.stderr is not None
    for line in worker.stdout:
        if not line.startswith("{"):
            continue
        event = json.loads(line)
        if event["event"] == "done":
            return dict(event)
        if event["event"] == "failed":
            raise _refused(event, complaints)
        if event["event"] == "complaint":
            complaints.append(event["text"])
        elif event["event"] == "step":
            last["phase"] = event["phase"]
            progress(f"build: {event['phase']}", event["done"], event["of"])
        else:
            last["node"] = event["node"]
    code = worker.wait()
    trouble = worker.stderr.read().strip().splitlines()[-3:]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    where = f"in phase {last['phase']!r}" if last["phase"] else "while parsing"
    raise CheckFailed(
        f"TensorRT's builder crashed ({name}) {where}; the last node parsed was "
        f"{last['node'] or 'none'}. " + " ".join([*complaints[-3:], *trouble])
    )


def _refused(event: dict[str, Any], complaints: Sequence[str]) -> Exception:
    text = f"{event['what']}: " + "; ".join(dict.fromkeys([*event["errors"], *complaints[-3:]]))
    return MissingEnvironment(text) if event.get("missing") else CheckFailed(text)


@contextmanager
def _environment(options: BuildOptions, scratch: Path) -> Iterator[dict[str, str]]:
    """The child's environment: where the RTX parser finds the library by the name it looks for."""
    environment = dict(os.environ)
    library = rtx_library() if options.flavour == "tensorrt-rtx" else None
    if library is not None and not rtx_link(library).exists():
        (scratch / rtx_link(library).name).symlink_to(library)
        paths = [str(scratch), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    yield environment


def find_engine(bundle: Bundle, flavour: str | None = None) -> Path:
    """The only engine that a bundle has of a flavour (None: of its target); BundleError if none."""
    kind = flavour or bundle.target
    found = engine_folders(bundle)
    found = [folder for folder in found if folder.name.rpartition("-")[0].endswith(f"-{kind}")]
    if not found:
        raise BundleError(
            f"{bundle.folder}: no engine for {kind}; build one: "
            f"cla-export build {bundle.folder} --target {kind}"
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise BundleError(
            f"{bundle.folder}: {len(found)} engines for {kind} ({names}); name one: --engine "
            f"{found[0]}"
        )
    return found[0]


def rebuild_command(
    bundle: Bundle, record: dict[str, Any], *, compute_capability: str | None = None
) -> str:
    """The command that builds an engine again as it was, or for another compute capability."""
    options = record["options"]
    parts = [f"cla-export build {bundle.folder} --target {record['flavour']}"]
    parts += [f"--{name} {options[name]}" for name in ("capacity", "slots", "chunk")]
    capabilities = options["compute_capabilities"]
    if capabilities and compute_capability is not None:
        capabilities = [compute_capability]
    if capabilities:
        parts.append(f'--compute-capability "{" ".join(capabilities)}"')
    flags = ("refit", "strip", "weight_streaming", "version_compatible")
    parts += [f"--{name.replace('_', '-')}" for name in flags if options[name]]
    if options["timing_cache"] is not None:
        parts.append(f"--timing-cache {options['timing_cache']}")
    return " ".join([*parts, "--force"])


def open_engine(bundle: Bundle, folder: Path) -> Built:
    """Check that an engine was built from this bundle's graph and is whole, before it is loaded."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        again = rebuild_command(bundle, record)
        engine, digest = record["engine"], record["graph_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{folder}: not an engine folder ({error!r}); build it: cla-export build "
            f"{bundle.folder}"
        ) from error
    path = folder / ENGINE
    if digest != graph_digest(bundle):
        raise BundleError(
            f"{folder}: built from another graph than {bundle.graph}; rebuild: {again}"
        )
    if not path.is_file() or sha256(path) != engine["sha256"]:
        raise BundleError(f"{path}: missing or changed after it was built; rebuild: {again}")
    return Built(folder, record)
