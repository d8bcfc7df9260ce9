"""The process that builds one engine: reads a request, writes events as JSON lines, may crash.

    python -m cla_export.engines.tensorrt_worker FOLDER     # holds request.json and model.onnx

Events: node (being parsed), step (of a phase of the build), complaint (a warning or an error of
TensorRT's), then done or failed. Nothing here imports more than it must: both flavours have one
API, and what differs is asked of the module.
"""

import json
import re
import resource
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

_FLAGS = {
    "refit": ("REFIT",),
    "strip": ("STRIP_PLAN", "REFIT_IDENTICAL"),
    "weight_streaming": ("WEIGHT_STREAMING",),
    "version_compatible": ("VERSION_COMPATIBLE",),
}
_PARSING = re.compile(r"(?:Parsing node: |Static check for parsing node: )(\S+)")


def _say(event: str, **content: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **content}) + "\n")
    sys.stdout.flush()


def main(folder: Path) -> int:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    trt = import_module(request["module"])
    start = time.monotonic()
    logger = _logger(trt)
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # pybind's own, without a driver where one is needed
        _say("failed", what="TensorRT has no builder here", errors=[str(error)], missing=True)
        return 1
    if builder is None:
        _say("failed", what="TensorRT has no builder here", errors=[], missing=True)
        return 1
    network = builder.create_network(_network_flags(trt))
    if request["plugins"]:
        import_module("cla_export.plugin.tensorrt").register(trt)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((folder / "model.onnx").read_bytes(), request["graph"]):
        errors = [_error(parser.get_error(i)) for i in range(parser.num_errors)]
        _say("failed", what="TensorRT's parser refuses the graph", errors=errors)
        return 1
    config = builder.create_builder_config()
    _configure(trt, builder, config, network, request)
    monitor = _monitor(trt)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        _say("failed", what="TensorRT's builder refuses the graph", errors=[])
        return 1
    with Path(request["engine"]).open("wb") as file:
        file.write(plan)
    if (cache := request["timing_cache"]) is not None and config.get_timing_cache() is not None:
        Path(cache).write_bytes(bytes(config.get_timing_cache().serialize()))
    _say(
        "done",
        versions={request["module"]: trt.__version__},
        layers=network.num_layers,
        seconds=round(time.monotonic() - start, 3),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return 0


def _error(error: Any) -> str:  # noqa: ANN401  # TensorRT's ParserError
    return f"{error.desc().strip()} (node {error.node_name() or error.node()})"


def _network_flags(trt: Any) -> int:  # noqa: ANN401  # one of two modules
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, builder: Any, config: Any, network: Any, request: Any) -> None:  # noqa: ANN401
    """Profiles, flags and compute capabilities."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for shapes in request["profiles"].values():
        profile = builder.create_optimization_profile()
        for value in inputs:
            setter = profile.set_shape_input if value.is_shape_tensor else profile.set_shape
            sizes = shapes[value.name]
            setter(value.name, *([] if value.shape == () and not value.is_shape_tensor else sizes))
        config.add_optimization_profile(profile)
    for name, flags in _FLAGS.items():
        for flag in flags if request[name] else ():
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if capabilities := request["compute_capabilities"]:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            value = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}")
            config.set_compute_capability(value, index)
    if request["timing_cache"] is not None:
        path = Path(request["timing_cache"])
        old = path.read_bytes() if path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(old), ignore_mismatch=False)


def _logger(trt: Any) -> Any:  # noqa: ANN401
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Passes on which node is parsed, and what TensorRT complains of."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if (node := _PARSING.search(message)) is not None:
                _say("node", node=node[1])
            elif severity <= trt.ILogger.Severity.WARNING:
                _say("complaint", text=message.strip())

    return Logger()


def _monitor(trt: Any) -> Any:  # noqa: ANN401
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on how far each phase is; called from TensorRT's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            with self._lock:
                self._steps[phase] = steps
            _say("step", phase=phase, done=0, of=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            _say("step", phase=phase, done=step + 1, of=self._steps.get(phase, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.get(phase, 1)
            _say("step", phase=phase, done=steps, of=steps)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
