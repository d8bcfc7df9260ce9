"""The model that Triton's Python backend runs: an engine, whose sequences are Triton's requests.

Two threads beside Triton's own: the engine's, and one that tells Triton what it delivers, so that
the engine never waits for a client. That one alone touches requests that run: asking whether one
was cancelled while its last answer is on its way would bring the server down. Importable only in
Triton's Python backend.
"""

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import triton_python_backend_utils as pb

from cla_export.deploy.triton_config import read_parameters
from cla_export.deploy.triton_metrics import TritonMetrics
from cla_export.deploy.triton_tensors import read_body, to_error, to_response
from cla_export.errors import BadInput, ClaExportError
from cla_export.serve.answers import Usage
from cla_export.serve.engine import STALLED_FAILURE, NotReady, QueueFull
from cla_export.serve.errors import ApiError, from_failure, from_refusal
from cla_export.serve.intake import check_length, encode, make_request
from cla_export.serve.metrics import Metrics
from cla_export.serve.requests import Output, Request
from cla_export.serve.scheduler import Outputs
from cla_export.serve.server import (
    Opened,
    Options,
    check_options,
    create_engine,
    open_model,
)

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05  # between two looks for cancelled requests
_TELL_SECONDS = 0.5  # between two tellings of metrics


@dataclass(frozen=True, slots=True)
class Running:
    """A request that the engine has: where its answers go, and what it used so far."""

    sender: Any  # Triton's InferenceResponseSender
    usage: Usage


class TritonPythonModel:
    """What Triton makes one of for each instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that the model's configuration names."""
        version_folder = Path(args["model_repository"], args["model_version"])
        try:
            parameters = read_parameters(json.loads(args["model_config"]))
            options = parameters.to_options(version_folder)
            check_options(options)
            opened = open_model(version_folder / parameters.bundle, options)
        except ClaExportError as error:
            raise pb.TritonModelException(f"{args['model_name']}: {error}") from error
        pool = opened.pool
        pb.Logger.log_info(
            f"{args['model_name']} on {opened.executor.backend}: {opened.bundle.layout.describe()};"
            f" {pool.slots} slots of {pool.capacity} tokens, {pool.total} bytes of KV cache"
        )
        self.start(opened, options, args["model_name"], args["model_version"])

    def start(self, opened: Opened, options: Options, name: str, version: str) -> None:
        """Take requests for an opened bundle from now on."""
        bundle = opened.bundle
        metrics = Metrics(name, bundle.layout, opened.cache_dtype)
        self._model, self._seconds = opened.model, options.request_seconds
        self._delivered: SimpleQueue[Outputs | None] = SimpleQueue()
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()  # of _running
        self.engine = create_engine(opened, options, self._delivered.put, metrics)
        self._metrics = TritonMetrics(metrics, self.engine, name, version)
        self.engine.start()
        self._worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self._worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Queue requests; their answers are sent as they come."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._queue(request, sender)
            except ApiError as error:
                _end(sender, to_error(error))
            except Exception as error:  # ours
                _log.exception("a request could not be read")
                _end(sender, to_error(ApiError(500, f"the model failed: {error!r}")))

    def finalize(self) -> None:
        """Let go of everything; Triton unloads a model once its requests have ended."""
        self.engine.stop()
        self._delivered.put(None)
        self._worker.join()
        del self._metrics  # while Triton still listens: their end is told to it

    def _queue(self, request: Any, sender: Any) -> None:  # noqa: ANN401
        asked = self._read(request)
        with self._lock:  # outputs that come at once wait until it is known whose they are
            try:
                number = self.engine.submit([asked])[0]
            except (QueueFull, NotReady) as error:
                raise from_refusal(error) from error
            except BadInput as error:
                raise ApiError(400, str(error)) from error
            self._running[number] = Running(sender, Usage(len(asked.prompt)))

    def _read(self, request: Any) -> Request:  # noqa: ANN401
        body = read_body(request)
        micros = request.timeout()
        seconds = min(self._seconds, micros / 1e6) if micros else self._seconds
        try:
            prompt = encode(self._model, body.prompt[0], body.add_special_tokens)
        except BadInput as error:
            raise ApiError(400, str(error)) from error
        deadline = self.engine.clock() + seconds
        asked = make_request(self._model, body, prompt, body.max_tokens, deadline)
        check_length(self._model, asked, "input_ids")
        return asked

    def _work(self) -> None:
        """Send answers, and look now and then who is gone, until None is delivered."""
        look, tell = 0.0, 0.0  # when to do it next
        while True:
            try:
                outputs = self._delivered.get(timeout=max(0.0, look - monotonic()))
            except Empty:
                outputs = []
            if outputs is None:
                return
            self._send(outputs)
            if monotonic() >= look:
                self._look()
                look = monotonic() + _LOOK_SECONDS
            if monotonic() >= tell:
                self._metrics.update()
                tell = monotonic() + _TELL_SECONDS

    def _send(self, outputs: Outputs) -> None:
        for number, output in outputs:
            with self._lock:
                known = self._running
                running = known.pop(number, None) if output.last else known.get(number)
            if running is None:
                continue  # it failed here already
            try:
                _tell(running, output)
            except Exception:  # Triton's: this request's trouble, and not the others'
                _log.exception("an answer could not be sent")
                self.engine.cancel([number])

    def _look(self) -> None:
        """Cancel what nobody waits for; end what waits for a step that hangs."""
        with self._lock:
            running = list(self._running.items())
        gone = [number for number, one in running if one.sender.is_cancelled()]
        if running and self.engine.stalled:
            gone = [number for number, _ in running]
            self._send([(number, _STALLED) for number in gone])
        if gone:
            self.engine.cancel(gone)


_STALLED = Output(failure=STALLED_FAILURE)


def _tell(running: Running, output: Output) -> None:
    if output.failure is not None:
        _end(running.sender, to_error(from_failure(output.failure)))
        return
    running.usage.add(output, 0)
    response = to_response(output, running.usage)
    if output.last:
        _end(running.sender, response)
    else:
        running.sender.send(response)


def _end(sender: Any, response: Any) -> None:  # noqa: ANN401
    sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
