"""A deployment on Ray Serve, decided before Ray starts: replicas, their devices, their slots."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cla_export.bundle import Bundle, open_bundle
from cla_export.deploy.ray_args import ReplicaArgs
from cla_export.deploy.replicas import Replicas
from cla_export.engines import gpu_graph
from cla_export.engines.opening import backend_of
from cla_export.engines.tensorrt_build import FLAVOURS, find_engine, open_engine
from cla_export.errors import BadInput
from cla_export.serve.chat import find_template
from cla_export.serve.pool import PoolSize, pool_of, size_pool
from cla_export.serve.server import Options, check_options

DEPLOYMENT = "engine"  # its name in Ray
_HEALTH_SECONDS = 2.0  # between checks; Ray gives a replica up after three that fail
_RETRY_SECONDS = 1.0  # that a client is told to wait when the queue is full


@dataclass(frozen=True, slots=True)
class Scaling:
    """When Ray adds and removes replicas. Seconds."""

    up_after: float = 10.0  # of more load than the replicas' slots
    down_after: float = 300.0  # of less


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How a bundle is deployed. `replica` is what each replica does; the rest is Ray's part."""

    replica: ReplicaArgs
    replicas: Replicas
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    allow_no_key: bool = False
    cpus: float = 1.0  # of each replica
    gpus: float | None = None  # of each replica; None: what the bundle needs
    affinity: Literal["none", "prefix"] = "none"
    scaling: Scaling = field(default_factory=Scaling)
    queued: int = 256  # requests that may wait at each of Ray's proxies
    shutdown_seconds: float = 30.0
    certificate: Path | None = None
    private_key: Path | None = None


@dataclass(frozen=True, slots=True)
class RayPlan:
    """Options that were checked against the bundle."""

    options: RayOptions
    name: str  # of the model
    backend: str
    layout: str
    pool: PoolSize  # of each replica
    gpus: float

    @property
    def application(self) -> str:
        """Its name in Ray."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.name)

    def deployment(self) -> dict[str, Any]:
        """The deployment's entry in a Serve config."""
        options, slots = self.options, self.pool.slots
        least, most = options.replicas.least, options.replicas.most
        scaling = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": slots,
            "upscale_delay_s": options.scaling.up_after,
            "downscale_delay_s": options.scaling.down_after,
        }
        router = {
            "request_router_class": "cla_export.deploy.ray_router.PrefixRouter",
            "request_router_kwargs": {"slots": slots},
        }
        return {
            "name": DEPLOYMENT,
            **({"num_replicas": least} if least == most else {"autoscaling_config": scaling}),
            "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": self.gpus},
            # The next requests lie ready in the replica; the others wait for whichever is first.
            "max_ongoing_requests": 2 * slots,
            "max_queued_requests": options.queued,
            "backpressure_config": {"status_code": 429, "retry_after_s": _RETRY_SECONDS},
            "health_check_period_s": _HEALTH_SECONDS,
            "graceful_shutdown_timeout_s": options.shutdown_seconds,
            **({"request_router_config": router} if options.affinity == "prefix" else {}),
        }

    def http(self, port: int | None = None) -> dict[str, Any]:
        """Where Ray's proxies listen."""
        options = self.options
        tls = {"ssl_certfile": options.certificate, "ssl_keyfile": options.private_key}
        files = {name: str(path.resolve()) for name, path in tls.items() if path is not None}
        return {"host": options.host, "port": port or options.port, **files}


def make_plan(options: RayOptions) -> RayPlan:
    """Read the bundle and decide; nothing is started.

    Raises BadInput, BundleError and MissingEnvironment as `open_model` does, but for what only the
    replica's machine can tell.
    """
    if options.cpus <= 0:
        raise BadInput(f"--num-cpus is {options.cpus}; expected more than 0")
    if options.gpus is not None and options.gpus < 0:
        raise BadInput(f"--num-gpus is {options.gpus}; expected 0 or more")
    if options.queued < 1:
        raise BadInput(f"--max-queued-requests is {options.queued}; expected at least 1")
    served = replace(
        options.replica.options(),
        host=options.host,
        allow_no_key=options.allow_no_key,
        certificate=options.certificate,
        private_key=options.private_key,
    )
    check_options(served)
    bundle = open_bundle(options.replica.bundle)
    find_template(bundle.folder, served.chat_template)  # raises for what it cannot read
    backend = backend_of(bundle, served.backend)
    on_gpu = backend in FLAVOURS or (backend == "onnxruntime" and gpu_graph.takes(bundle))
    return RayPlan(
        options,
        name=served.name or bundle.folder.resolve().name,
        backend=backend,
        layout=bundle.layout.describe(),
        pool=_pool(bundle, backend, served),
        gpus=float(on_gpu) if options.gpus is None else options.gpus,
    )


def _pool(bundle: Bundle, backend: str, served: Options) -> PoolSize:
    """Each replica's KV pool, as it will open it."""
    if backend not in FLAVOURS:
        return pool_of(bundle, backend, served.max_len, served.slots, served.kv_memory)
    built = open_engine(bundle, served.engine or find_engine(bundle, backend)).record["options"]
    slots = served.slots or built["slots"]
    return size_pool(bundle.layout, bundle.dtype, built["capacity"], slots, None)
