"""From a bundle and a backend's name to the executor that runs it: the one place that knows all."""

from pathlib import Path

from cla_export.bundle import Bundle
from cla_export.engines import gpu_graph
from cla_export.engines.executor import Executor
from cla_export.engines.tensorrt_build import FLAVOURS, check_installed
from cla_export.errors import BadInput

BACKENDS = ("onnxruntime", *FLAVOURS, "torch")


def backend_of(bundle: Bundle, backend: str | None = None) -> str:
    """What runs a bundle: the backend asked for if it can, else what it was exported for.

    Raises:
        BadInput: there is no such backend, or it runs no bundle of this target.
    """
    own = bundle.target if bundle.target in FLAVOURS else "onnxruntime"
    if backend is None or backend in (own, "torch"):
        return backend or own
    if backend not in BACKENDS:
        raise BadInput(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend in FLAVOURS and own in FLAVOURS:
        return backend  # both flavours take the same graphs
    raise BadInput(
        f"{bundle.folder}: exported for {bundle.target}, which {backend} does not run; export it "
        f"again: cla-export export {bundle.source} DEST --target {backend}"
    )


def cache_dtype(bundle: Bundle, backend: str) -> str:
    """Dtype of a bundle's caches on a backend: PyTorch runs the model folder, in float32."""
    return "float32" if backend == "torch" else bundle.cache_dtype


def open_executor(
    bundle: Bundle,
    backend: str | None = None,
    *,
    engine: Path | None = None,
    capacity: int | None = None,
    slots: int | None = None,
    threads: int | None = None,
    module: str | None = None,
) -> Executor:
    """Open a bundle on a backend.

    Args:
        bundle: an opened bundle.
        backend: one of `BACKENDS`; None: what the bundle was exported for. `torch` runs the model
            folder it was exported from. `onnxruntime` runs 16-bit bundles on a GPU where there is
            one, and bfloat16 nowhere else.
        engine: folder of a TensorRT engine; None: the only one that the bundle has.
        capacity: tokens a slot can hold; None: all of the model's positions, or all that an engine
            was built for. An engine's is fixed.
        slots: rows that can run side by side; None: one, or all that an engine was built for.
        threads: intra-operator threads (onnxruntime only).
        module: `package.module:factory`, where the bundle was exported with one (torch only).

    Raises:
        BadInput: an option does not fit the backend, or the backend the bundle.
        BundleError: the engine is missing, or not for this graph, version or GPU.
        MissingEnvironment: the backend is not installed, or has no GPU to run on.
    """
    asked, backend = backend, backend_of(bundle, backend)
    if engine is not None and backend not in FLAVOURS:
        raise BadInput(f"{engine}: {backend} takes no engine; engines are of {', '.join(FLAVOURS)}")
    if backend == "onnxruntime":
        if gpu_graph.takes(bundle):
            from cla_export.engines import onnxruntime_cuda

            on_gpu = onnxruntime_cuda.OnnxRuntimeCudaExecutor
            return on_gpu(bundle, capacity=capacity, slots=slots or 1)
        from cla_export.engines.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(bundle, capacity=capacity, slots=slots or 1, threads=threads)
    if backend == "torch":
        from cla_export.engines.torch import TorchExecutor
        from cla_export.models.checkpoint import load_model, open_checkpoint

        checkpoint = open_checkpoint(bundle.source, bundle.module_named(module), bundle.layout)
        model = load_model(checkpoint)
        return TorchExecutor(model, capacity=capacity or bundle.max_positions, slots=slots or 1)
    check_installed(backend)
    from cla_export.engines.tensorrt import TensorRTExecutor

    flavour = backend if engine is None else asked
    opened = TensorRTExecutor(bundle, engine, flavour=flavour, slots=slots)
    if capacity is not None and capacity != opened.capacity:
        raise BadInput(
            f"capacity is {capacity}; {opened.folder} was built for {opened.capacity}: build it "
            f"again with --capacity {capacity}"
        )
    return opened
