"""Executors of this package: on a bundle's own graph, on its stock graph, on PyTorch."""

from collections.abc import Callable, Sequence
from functools import partial

from random_model import Floats, Prompts, made_up

from cla_export.bundle import Bundle
from cla_export.engines.executor import Executor
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.opening import open_executor
from peers.peer import Peer


class ExecutorPeer(Peer):
    """An executor; `stock` runs model.onnx even where there is a choice."""

    def __init__(
        self, bundle: Bundle, threads: int, *, stock: bool = False, backend: str | None = None
    ) -> None:
        self._open: Callable[..., Executor] = (
            partial(OnnxRuntimeExecutor, bundle, threads=threads, stock=True)
            if stock
            else partial(open_executor, bundle, backend, threads=threads)
        )
        self._executor: Executor | None = None

    def start(self, batch: int, capacity: int) -> None:
        self.free()
        self._executor = self._open(capacity=capacity, slots=batch)

    def fill(self, context: int) -> None:
        executor = self._opened()
        for made in made_up(executor.layout, executor.slots, context):
            executor.write(*made)

    def prefill(self, rows: Prompts) -> Floats:
        return self._opened().prefill_rows(0, rows.tolist())

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        return self._opened().decode(range(len(tokens)), tokens, [length] * len(tokens))

    def free(self) -> None:
        self._executor = None

    def _opened(self) -> Executor:
        assert self._executor is not None, "start comes first"
        return self._executor
