"""Ray Serve on this machine, as long as the command runs: its processes start and end with it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Self

from cla_export.deploy.ray_affinity import CALLBACK
from cla_export.deploy.ray_config import QUIET
from cla_export.deploy.ray_plan import DEPLOYMENT, RayPlan
from cla_export.environment import cpus, memory, nvidia_gpus
from cla_export.errors import BadInput, MissingEnvironment, RunError
from cla_export.serve.process import listen

_STORE_BYTES = 128 * 2**20  # of Ray's object store; requests do not go through it
_INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 1.0  # between looks at the replicas
_DRAIN_LOOK_SECONDS = 0.1  # while they drain
_ANSWER_SECONDS = 10.0  # that they have to answer then
_FLUSH_SECONDS = 0.2  # for the last bytes on their way through Ray's proxy


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


def run(plan: RayPlan, say: Callable[[str], None]) -> int:
    """Start Ray and the replicas, and serve until told to stop; the process's exit code.

    SIGTERM or SIGINT drains: no new requests come in, those that run may finish for the options'
    `shutdown_seconds`. A second signal stops at once.

    Args:
        plan: what to run.
        say: called with a line for the operator: the address once requests are taken, and how many
            replicas run whenever that changes.

    Raises:
        BadInput: the port is taken, or the replicas' pools are larger than the memory.
        MissingEnvironment: too few processors or GPUs for the least number of replicas.
        RunError: a replica could not start, or Ray ended.
    """
    with listen(plan.options.host, plan.options.port) as free:
        port = int(free.getsockname()[1])
    room = _check_room(plan)
    _check_memory(plan)
    if room < plan.options.replicas.most:
        say(f"this machine has room for {room} of {plan.options.replicas.most} replicas")
    with _Signals() as signals, _ray(plan, signals):
        with signals.interrupting():
            _start(plan, port)
        scheme = "http" if plan.options.certificate is None else "https"
        say(f"serving {plan.name} on {scheme}://{plan.options.host}:{port}")
        _watch(plan, signals, say)
        stopping = threading.Thread(target=_drain, args=(plan,), daemon=True)
        stopping.start()
        while stopping.is_alive() and not signals.again.wait(0.1):
            pass
    return _INTERRUPTED if signals.again.is_set() else 0


class _Signals:
    """SIGTERM and SIGINT: the first one, and any other."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.again = threading.Event()
        self._interrupts = False

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals, again if somebody else took them."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """The first signal raises KeyboardInterrupt meanwhile, or has come already and does."""
        if self.told.is_set():
            raise KeyboardInterrupt
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _hear(self, _number: int, _frame: object) -> None:
        (self.again if self.told.is_set() else self.told).set()
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt


@contextmanager
def _ray(plan: RayPlan, signals: _Signals) -> Iterator[None]:
    """A Ray of our own, with all of this machine's processors and GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what it logs is of no use here
    if plan.options.affinity == "prefix":  # Ray's processes have the environment of this one
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    import ray

    init = partial(
        ray.init,
        address="local",
        num_cpus=cpus(),
        num_gpus=_gpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_STORE_BYTES,
    )
    # Ray prints what its processes say about each other on standard output; see _watch instead.
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        ThreadPoolExecutor(1) as another,
    ):
        try:
            # Ray takes the signals, ends on them at once, and would leave processes.
            opening = another.submit(init)
            while not opening.done():
                wait([opening], timeout=0.05)
                signals.listen()
            opening.result()
            yield
        finally:
            ray.shutdown()


def _watch(plan: RayPlan, signals: _Signals, say: Callable[[str], None]) -> None:
    """Until the first signal: say how many replicas run, and what Ray says of it, on a change."""
    from ray import serve
    from ray.exceptions import RayError

    told = ""
    while not signals.told.wait(_LOOK_SECONDS):
        try:
            found = serve.status().applications[plan.application].deployments[DEPLOYMENT]
        except (RayError, KeyError) as error:
            raise RunError(f"Ray has ended, or its Serve: {error!r}") from error
        states = {str(getattr(s, "value", s)): n for s, n in found.replica_states.items() if n}
        line = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
        if line != told and (told or len(states) > 1):
            say(f"replicas: {line}. {found.message}".rstrip(". "))
        told = line


def _check_room(plan: RayPlan) -> int:
    """Replicas that fit the processors and GPUs; MissingEnvironment if that is too few."""
    replicas, room = plan.options.replicas, plan.options.replicas.most
    needs = (
        ("CPU", cpus(), plan.options.cpus, "--num-cpus"),
        ("GPU", _gpus(), plan.gpus, "--num-gpus"),
    )
    for kind, have, each, option in needs:
        fit = int(have / each + 1e-6) if each else room
        if fit < replicas.least:
            raise MissingEnvironment(
                f"at least {replicas.least} replicas of {each:g} {kind} each are asked for, and "
                f"this machine has {have} {kind}: ask for fewer with --replicas, or a smaller "
                f"share with {option}; a cluster takes what --write FILE.yaml writes"
            )
        room = min(room, fit)
    return room


def _gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(nvidia_gpus()[0])
    return found if visible is None else min(found, len([n for n in visible.split(",") if n]))


def _check_memory(plan: RayPlan) -> None:
    have, least = memory(), plan.options.replicas.least
    if have is not None and not plan.gpus and least * plan.pool.total > have:
        raise BadInput(
            f"{least} replicas with KV pools of {plan.pool.total:,} bytes need more than the "
            f"{have:,} bytes of this machine; give a smaller --kv-memory, or fewer --replicas"
        )


def _start(plan: RayPlan, port: int) -> None:
    from ray import serve

    from cla_export.deploy.ray import bind

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = plan.http(port)
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
    target = bind(plan.options.replica.to_json(), plan.deployment())
    try:
        serve.run(target, name=plan.application, logging_config=QUIET)
    except RuntimeError as error:
        raise RunError(f"the replicas did not start: {_why(plan) or error}") from error


def _why(plan: RayPlan) -> str:
    """What the last replica that could not start raised; empty if none is known."""
    from ray import serve

    found = serve.status().applications.get(plan.application)
    deployment = None if found is None else found.deployments.get(DEPLOYMENT)
    return "" if deployment is None else raised(deployment.message)


def raised(text: str) -> str:
    """The exception that ends a text with tracebacks, without them."""
    lines = text.rpartition("Traceback (most recent call last):")[2].strip("\n").splitlines()
    return "\n".join(dropwhile(lambda line: line.startswith("  "), lines))


def _drain(plan: RayPlan) -> None:
    """Let what runs end, for as long as it may; the rest ends with an error."""
    from ray import serve

    replicas = serve.get_app_handle(plan.application)
    ends = time.monotonic() + plan.options.shutdown_seconds

    def all_of_them(method: str) -> list[object]:
        asked = replicas.broadcast(method)
        return list(asked.results(timeout_s=_ANSWER_SECONDS, return_exceptions=True))

    try:
        all_of_them("drain")
        while False in all_of_them("idle") and time.monotonic() < ends:
            time.sleep(_DRAIN_LOOK_SECONDS)
        all_of_them("stop")
        time.sleep(_FLUSH_SECONDS)
    except TimeoutError:
        return  # they hang, and end with Ray
