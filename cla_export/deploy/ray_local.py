"""Ray Serve on this machine, as long as the command runs: its processes start and end with it."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cla_export.deploy.ray_affinity import CALLBACK
from cla_export.deploy.ray_config import QUIET
from cla_export.deploy.ray_plan import RayPlan
from cla_export.environment import memory
from cla_export.errors import BadInput, MissingEnvironment, RunError

_STORE_BYTES = 128 * 2**20  # of Ray's object store; requests do not go through it
_INTERRUPTED = 130


def check_installed() -> None:
    """Raise MissingEnvironment without Ray Serve, or what a server needs."""
    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise MissingEnvironment(
            f"{error.name} is not installed; pip install 'cla-export[ray]'"
        ) from error


def run(plan: RayPlan, announce: Callable[[str, int], None]) -> int:
    """Start Ray and the replicas, and serve until told to stop; the process's exit code.

    SIGTERM or SIGINT drains: no new requests come in, those that run may finish for the options'
    `shutdown_seconds`. A second signal stops at once.

    Args:
        plan: what to run.
        announce: called once requests are taken, with the address and with how many replicas this
            machine has room for.

    Raises:
        BadInput: the port is taken, or the replicas' pools are larger than the memory.
        MissingEnvironment: too few processors or GPUs for the least number of replicas.
        RunError: a replica could not start.
    """
    port = _free_port(plan)
    _check_memory(plan)
    stop = _Stop()
    with stop.listening(), _ray(plan) as room:
        from ray import serve

        _start(plan, port)
        if not stop.told.is_set():
            scheme = "http" if plan.options.certificate is None else "https"
            announce(f"{scheme}://{plan.options.host}:{port}", room)
            stop.told.wait()
        if not stop.at_once.is_set():
            drained = threading.Thread(target=_drain, args=(plan, serve), daemon=True)
            drained.start()
            while drained.is_alive() and not stop.at_once.is_set():
                drained.join(0.1)
    return _INTERRUPTED if stop.at_once.is_set() else 0


class _Stop:
    """Signals: the first drains, the second does not."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.at_once = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._hear) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _hear(self, _number: int, _frame: object) -> None:
        (self.at_once if self.told.is_set() else self.told).set()


@contextmanager
def _ray(plan: RayPlan) -> Iterator[int]:
    """A Ray of our own; the replicas that it has room for, at most those asked for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if plan.options.affinity == "prefix":
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_STORE_BYTES,
    )
    try:
        yield _room(plan, ray.cluster_resources())
    finally:
        ray.shutdown()


def _room(plan: RayPlan, there: dict[str, float]) -> int:
    """Replicas that fit the processors and GPUs; MissingEnvironment if that is too few."""
    replicas, room = plan.options.replicas, plan.options.replicas.most
    needs = (("CPU", plan.options.cpus, "--num-cpus"), ("GPU", plan.gpus, "--num-gpus"))
    for kind, each, option in needs:
        have = there.get(kind, 0.0)
        fit = int(have / each + 1e-6) if each else room
        if fit < replicas.least:
            raise MissingEnvironment(
                f"{replicas.least} replicas need {replicas.least * each:g} {kind}s, and Ray finds "
                f"{have:g} on this machine: ask for fewer with --replicas, or give each a smaller "
                f"share with {option} (now {each:g}); a cluster takes what --write FILE.yaml writes"
            )
        room = min(room, fit)
    return room


def _check_memory(plan: RayPlan) -> None:
    have, least = memory(), plan.options.replicas.least
    if have is not None and not plan.gpus and least * plan.pool.total > have:
        raise BadInput(
            f"{least} replicas with KV pools of {plan.pool.total:,} bytes need more than the "
            f"{have:,} bytes of this machine; give a smaller --kv-memory, or fewer --replicas"
        )


def _free_port(plan: RayPlan) -> int:
    """The port, which nobody listens on; BadInput if somebody does."""
    host, port = plan.options.host, plan.options.port
    try:
        with socket.create_server((host, port)) as listening:
            return int(listening.getsockname()[1])
    except OSError as error:
        raise BadInput(
            f"--host {host} --port {port}: cannot listen there ({error.strerror})"
        ) from error


def _start(plan: RayPlan, port: int) -> None:
    from ray import serve

    from cla_export.deploy.ray import bind

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = plan.http(port)
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
    target: Any = bind(plan.options.replica.to_json(), plan.deployment())
    try:
        serve.run(target, name=plan.application, logging_config=QUIET)
    except RuntimeError as error:
        raise RunError(f"the replicas did not start: {error}") from error


def _drain(plan: RayPlan, serve: Any) -> None:  # noqa: ANN401 - a module
    serve.delete(plan.application)
    serve.shutdown()
