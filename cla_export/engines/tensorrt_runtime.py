"""Load an engine of either flavour on this machine's GPU, once it is sure to be the right one.

TensorRT gives an engine for another version or another GPU back as None, with a line in its log:
what it was built with is checked first, and whatever is left ends in an error with the rebuild
command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from cla_export.bundle import Bundle
from cla_export.engines.cuda_memory import CudaMemory, Memory
from cla_export.engines.device_chooser import DeviceChooser, RowChooser
from cla_export.engines.tensorrt_build import (
    ENGINE,
    FLAVOURS,
    Built,
    check_installed,
    fixed_graph,
    gpu_label,
    rebuild_command,
)
from cla_export.errors import BundleError


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine on a GPU, as `TensorRTExecutor` drives it.

    engine: TensorRT's ICudaEngine.
    new_context: makes an IExecutionContext whose memory the caller manages. `fixed`: for calls of
        one shape alone, for which kernels are worth specialising at once (TensorRT-RTX).
    memory: the GPU's.
    new_chooser: makes what chooses tokens there, of logits' dtype and vocabulary, and rows at most.
    owners: what the engine needs for as long as it lives.
    """

    engine: Any
    new_context: Callable[[bool], Any]
    memory: Memory
    new_chooser: Callable[[str, int, int], RowChooser]
    owners: tuple[Any, ...] = ()


def load_engine(bundle: Bundle, built: Built) -> Loaded:
    """Deserialise an engine that `open_engine` found whole.

    Raises:
        MissingEnvironment: the flavour is not installed, or there is no GPU.
        BundleError: it was built for another version or another GPU, with the command to rebuild.
    """
    flavour = built.record["flavour"]
    check_installed(flavour)
    trt = import_module(FLAVOURS[flavour])
    check_version(bundle, built, trt.__version__)
    memory = CudaMemory()
    check_gpu(bundle, built, memory.name, memory.compute_capability)
    import_module("cla_export.plugin.tensorrt").register(trt)
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((built.folder / ENGINE).read_bytes())
    if engine is None:
        raise BundleError(
            f"{built.folder}: {flavour} {trt.__version__} does not load this engine on "
            f"{memory.name}; its log says why. Rebuild: {rebuild_command(bundle, built.record)}"
        )
    options = built.record["options"]
    if options["strip"]:
        _put_weights_in(trt, engine, logger, bundle, built)
    if options["weight_streaming"]:  # before any context is made; by default nothing streams
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()

    def new_context(fixed: bool) -> Any:  # noqa: ANN401
        by_caller = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if flavour != "tensorrt-rtx":
            return engine.create_execution_context(by_caller)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(by_caller)
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if fixed else kinds.LAZY
        return engine.create_execution_context(config)

    return Loaded(engine, new_context, memory, partial(DeviceChooser, memory), (runtime, logger))


def _put_weights_in(trt: Any, engine: Any, logger: Any, bundle: Bundle, built: Built) -> None:  # noqa: ANN401
    """Refit an engine that was built without weights from the bundle's."""
    refitter = trt.Refitter(engine, logger)
    reader = trt.OnnxParserRefitter(refitter, logger)
    graph = fixed_graph(bundle, int(built.record["options"]["capacity"]))
    if not reader.refit_from_bytes(graph, str(bundle.graph)) or not refitter.refit_cuda_engine():
        errors = "; ".join(reader.get_error(i).desc().strip() for i in range(reader.num_errors))
        raise BundleError(
            f"{built.folder}: built without weights, and the bundle's do not go in "
            f"({errors or 'see its log'}). Rebuild: {rebuild_command(bundle, built.record)}"
        )


def check_version(bundle: Bundle, built: Built, version: str) -> None:
    """Refuse an engine of another TensorRT, unless it was built to be version-compatible."""
    (was,) = built.record["versions"].values()
    if was != version and not built.record["options"]["version_compatible"]:
        raise BundleError(
            f"{built.folder}: built with {built.record['flavour']} {was}, and {version} is "
            f"installed; rebuild: {rebuild_command(bundle, built.record)}"
        )


def check_gpu(bundle: Bundle, built: Built, name: str, compute_capability: str) -> None:
    """Refuse an engine for other GPUs than the one that is here."""
    record = built.record
    if record["flavour"] == "tensorrt-rtx":
        wanted = record["options"]["compute_capabilities"]
        fits = not wanted or compute_capability in wanted
        was = f"compute capability {', '.join(wanted)}"
    else:
        was = record["gpu"]
        fits = gpu_label(was) == gpu_label(name)
    if not fits:
        raise BundleError(
            f"{built.folder}: built for {was}; this machine's GPU is {name}, compute capability "
            f"{compute_capability}. Rebuild: "
            f"{rebuild_command(bundle, record, compute_capability=compute_capability)}"
        )
