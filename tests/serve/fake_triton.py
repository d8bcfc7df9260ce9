"""As much of Triton's Python backend as a model uses, with requests that remember their answers."""

import json
import threading
from types import ModuleType
from typing import ClassVar

import numpy as np


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = (
        "invalid",
        "unavailable",
        "internal",
        "cancelled",
    )

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name, values):
        self.name, self._values = name, values

    def as_numpy(self):
        return self._values


class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Request:
    """`inputs`: name -> array. Its own response sender too."""

    def __init__(self, inputs, *, parameters=None, timeout=0, fails=False):
        self.inputs = {name: Tensor(name, values) for name, values in inputs.items()}
        self.responses = []
        self.ended = threading.Event()
        self.cancelled = False
        self._parameters, self._timeout, self._fails = parameters or {}, timeout, fails

    def parameters(self):
        return json.dumps(self._parameters)

    def timeout(self):
        return self._timeout

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        assert not self.ended.is_set(), "Triton dies of this"
        return self.cancelled

    def send(self, response, flags=0):
        if self._fails:
            self._fails = False
            raise RuntimeError("nobody listens")
        assert not self.ended.is_set(), "something came after the last answer"
        self.responses.append(response)
        if flags:
            self.ended.set()

    def values(self, name):
        """All of an output, of all responses."""
        return [value for one in self.responses for value in one.outputs[name].tolist()]


class Metric:
    def __init__(self, name, labels):
        self.name, self.labels, self.now = name, labels, 0.0

    def set(self, value):
        self.now = value

    def increment(self, value):
        assert value >= 0
        self.now += value

    def value(self):
        return self.now


class MetricFamily:
    GAUGE, COUNTER = "gauge", "counter"
    made: ClassVar[list[Metric]] = []

    def __init__(self, name, description, kind):
        assert description and kind in (self.GAUGE, self.COUNTER)
        self.name = name

    def Metric(self, labels):  # noqa: N802
        self.made.append(Metric(self.name, labels))
        return self.made[-1]


def backend() -> ModuleType:
    """A module to stand for triton_python_backend_utils."""
    module = ModuleType("triton_python_backend_utils")
    for thing in (TritonError, Tensor, InferenceResponse, MetricFamily):
        setattr(module, thing.__name__, thing)
    module.TritonModelException = type("TritonModelException", (Exception,), {})
    module.Logger = type("Logger", (), {"log_info": staticmethod(lambda _message: None)})
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    return module


def texts(*values):
    return np.array([value.encode() for value in values], np.object_)
