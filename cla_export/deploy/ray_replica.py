"""One replica: the application and the engine of `cla-export serve` in an actor of Ray Serve."""

from typing import Any

from prometheus_client import Metric
from ray import serve

from cla_export.deploy.ray_args import ReplicaArgs
from cla_export.deploy.ray_metrics import merged
from cla_export.serve.engine import State
from cla_export.serve.gate import App, Gate, Message, Receive, Scope, Send
from cla_export.serve.server import create_server, open_model

_STOP_SECONDS = 2.0  # that a step may still take at the end
_METRICS_SECONDS = 5.0  # that the other replicas have to tell theirs


@serve.ingress()
class Replica:
    """A bundle on one device: requests come from Ray's proxy, the KV pool stays here.

    Args:
        args: `ReplicaArgs`, as plain data. What is wrong with them, or with the bundle, is raised
            and ends the deployment.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        given = ReplicaArgs.read(args)
        options = given.options()
        here = serve.get_replica_context()
        self._name: str = here.replica_id.unique_id
        self._all = serve.get_deployment_handle(here.deployment, here.app_name)
        app, self._engine = create_server(open_model(given.bundle, options), options)
        self._metrics = app.state.metrics
        gate = Gate(self._answer(app), options.keys, options.most_body, self._metrics.refused)
        self._gate = _named(gate, self._name)
        self._engine.start()

    def __serve_build_asgi_app__(self) -> App:
        return self._gate

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self._engine.state == State.dead:
            raise RuntimeError(f"the engine is dead: {self._engine.dead}")
        if self._engine.stalled:
            raise RuntimeError("no step of the engine has ended for too long")

    def families(self) -> tuple[str, list[Metric]]:
        """This replica's name and metrics."""
        return self._name, self._metrics.families(self._engine)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._engine.drain()

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._engine.idle

    def stop(self) -> None:
        """End all that run with an error."""
        self._engine.stop(_STOP_SECONDS)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self.stop()

    def _answer(self, app: App) -> App:
        """The application, but for /metrics, which are those of all replicas."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] != "/metrics":
                await app(scope, receive, send)
                return
            body = merged(await self._families_of_all())
            headers = [(b"content-type", self._metrics.content_type.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        return answer

    async def _families_of_all(self) -> dict[str, list[Metric]]:
        """By replica; those that do not answer in time are missing, this one never is."""
        try:
            asked = self._all.broadcast("families")
            found = await asked.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        except TimeoutError:
            found = []
        return dict([self.families(), *(told for told in found if isinstance(told, tuple))])


def _named(app: App, replica: str) -> App:
    """Answers say which replica gave them; the request's id is for Ray's proxy to add."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message["headers"] = [*kept, (b"x-replica", replica.encode())]
            await send(message)

        await app(scope, receive, send_named)

    return named
