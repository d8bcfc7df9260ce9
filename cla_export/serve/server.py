"""What is served, and how: options are checked, a bundle is opened, an application made of it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.bundle import Bundle, open_bundle
from cla_export.engines import gpu_graph
from cla_export.engines.executor import Executor
from cla_export.engines.opening import backend_of, cache_dtype, open_executor
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.environment import memory
from cla_export.errors import BadInput, MissingEnvironment
from cla_export.generation import end_tokens
from cla_export.serve.chat import find_template
from cla_export.serve.engine import Deliver, Engine, Limits
from cla_export.serve.model import ServedModel
from cla_export.serve.pool import PoolSize, pool_of, size_pool
from cla_export.serve.scheduler import Observer
from cla_export.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Options:
    """How a bundle is served. Times are seconds, sizes bytes."""

    backend: str | None = None
    engine: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    slots: int | None = None
    kv_memory: int | None = None
    max_len: int | None = None  # tokens of a slot; None: the model's positions
    chunk: int | None = None  # as of `Scheduler`
    prefill_seconds: float | None = None  # as of `Scheduler`
    threads: int | None = None
    name: str | None = None  # that clients call the model; None: the bundle's folder
    keys: tuple[str, ...] = ()
    allow_no_key: bool = False
    limits: Limits = field(default_factory=Limits)
    most_body: int = 4 * 2**20
    request_seconds: float = 600.0
    shutdown_seconds: float = 30.0
    certificate: Path | None = None
    private_key: Path | None = None
    chat_template: Path | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle that is ready to be served."""

    bundle: Bundle
    model: ServedModel
    executor: Executor
    pool: PoolSize

    @property
    def cache_dtype(self) -> str:
        """Dtype of the pool."""
        return cache_dtype(self.bundle, self.executor.backend)


def check_options(options: Options) -> None:
    """Raise BadInput for what must not be, MissingEnvironment for packages that are not there."""
    if options.host not in _HERE and not options.keys and not options.allow_no_key:
        raise BadInput(
            f"--host {options.host} lets other machines in, and there is no API key: give one "
            "with --api-key-file, or say --allow-no-key if everybody may use this server"
        )
    if (options.certificate is None) != (options.private_key is None):
        raise BadInput("TLS needs both --ssl-certfile and --ssl-keyfile")
    for path in (options.certificate, options.private_key):
        if path is not None and not path.is_file():
            raise BadInput(f"{path}: no such file")
    numbers = {
        "--slots": options.slots,
        "--max-len": options.max_len,
        "--chunk": options.chunk,
        "--threads": options.threads,
    }
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise BadInput(f"{name} is {number}; expected at least 1")
    if options.prefill_seconds is not None and not options.prefill_seconds > 0:
        raise BadInput(
            f"--prefill-budget is {1e3 * options.prefill_seconds:g} ms; expected more than 0"
        )
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingEnvironment(
            f"{error.name} is not installed; pip install 'cla-export[serve]'"
        ) from error


def open_model(folder: Bundle | Path | str, options: Options) -> Opened:
    """Open a bundle with a pool of the size that was asked for.

    Raises BadInput, BundleError and MissingEnvironment as `open_executor` does; BadInput, with the
    pool's table, if this machine has no room for it.
    """
    bundle = folder if isinstance(folder, Bundle) else open_bundle(folder)
    backend = backend_of(bundle, options.backend)
    fixed = backend in FLAVOURS  # an engine's capacity is what it was built for
    if fixed and options.kv_memory is not None:
        raise BadInput(
            f"--kv-memory does not fit {backend}: an engine's pool is what it was built for; say "
            "how many of its slots to use with --slots, or build it again"
        )
    pool = pool_of(bundle, backend, options.max_len, options.slots, options.kv_memory)
    room = memory()
    if room is not None and pool.total > room and not gpu_graph.takes(bundle) and not fixed:
        raise _no_room(pool)
    try:
        executor = open_executor(
            bundle,
            options.backend,
            engine=options.engine,
            capacity=options.max_len if fixed else pool.capacity,
            slots=None if fixed and options.slots is None else pool.slots,
            threads=options.threads,
        )
    except MemoryError as error:
        raise _no_room(pool) from error
    dtype = cache_dtype(bundle, backend)
    pool = size_pool(bundle.layout, dtype, executor.capacity, executor.slots, None)
    model = ServedModel(
        name=options.name or bundle.folder.resolve().name,
        created=int(time.time()),
        capacity=executor.capacity,
        vocab_size=executor.vocab_size,
        tokenizer=load_tokenizer(bundle.folder),
        template=find_template(bundle.folder, options.chat_template),
    )
    return Opened(bundle, model, executor, pool)


def _no_room(pool: PoolSize) -> BadInput:
    from cla_export.views.serving import as_text

    return BadInput(
        f"this machine has no room for a KV pool of {pool.total:,} bytes; give a smaller "
        f"--kv-memory, fewer --slots or a shorter --max-len\n{as_text(pool)}"
    )


def create_engine(opened: Opened, options: Options, deliver: Deliver, observer: Observer) -> Engine:
    """The engine for an opened bundle, which is not started. `deliver` and `observer` are its."""
    return Engine(
        opened.executor,
        deliver,
        tokenizer=opened.model.tokenizer,
        ends=end_tokens(opened.bundle.folder),
        chunk=options.chunk,
        prefill_seconds=options.prefill_seconds,
        limits=options.limits,
        observer=observer,
    )


def create_server(opened: Opened, options: Options) -> tuple["FastAPI", Engine]:
    """The application without its gate, and its engine, which is not started."""
    from cla_export.serve.app import Served, create_app
    from cla_export.serve.handlers import Service
    from cla_export.serve.metrics import Metrics
    from cla_export.serve.page import add_page
    from cla_export.serve.streams import Streams

    bundle, model = opened.bundle, opened.model
    metrics, streams = Metrics(model.name, bundle.layout, opened.cache_dtype), Streams()
    streams.engine = create_engine(opened, options, streams.deliver, metrics)
    service = Service(model, streams, options.request_seconds)
    app = create_app(Served(service, metrics))
    add_page(app, model, streams.engine, bundle.layout, opened.cache_dtype, opened.pool)
    return app, streams.engine
