"""Which experts the bundle's routers chose, and PyTorch made to follow.

Where two experts are nearly equal to a router, rounding decides, and what follows is another
computation and no error. So PyTorch goes the way that the bundle went, everything behind it is
compared as strictly as ever, and the choice itself is judged by its router's own scores: an expert
may be chosen in place of a better one where the scores differ by no more than rounding can explain
(`replay.differences`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cla_export.bundle import Bundle
from cla_export.engines.executor import Executor, Logits
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import GraphError

ROUTER = "router"  # a role, as those of `report.ROLES`
Routes = Mapping[int, NDArray[np.int64]]  # layer -> experts chosen for each token of a row, [S, k]
_TOPK = (torch.topk, Tensor.topk)


class RoutedExecutor(OnnxRuntimeExecutor):
    """An executor that keeps what every router chose for each token that a slot holds."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        change: Callable[[ir.Model], object] | None = None,
        **options: Any,  # noqa: ANN401  # those of any executor
    ) -> None:
        self._routers: dict[int, str] = {}  # layer -> output
        self._chosen: dict[int, NDArray[np.int64]] = {}  # layer -> [slots, C, k]

        def with_routers(model: ir.Model) -> None:
            self._routers = _add_routers(model)
            if change is not None:
                change(model)

        super().__init__(bundle, change=with_routers, **options)

    def routes(self, slot: int, start: int, end: int) -> Routes:
        """What was chosen for these places of a slot."""
        chosen = self._chosen.items()
        return {layer: whole[slot, start:end].copy() for layer, whole in chosen}

    def _run_with(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
        more: Iterable[str],
    ) -> tuple[Logits, list[NDArray[np.generic]]]:
        asked = list(more)
        names = [*asked, *self._routers.values()]
        logits, made = super()._run_with(first, input_ids, starts, counts, keep, names)
        for layer, flat in zip(self._routers, made[len(asked) :], strict=True):
            chosen = flat.reshape(*input_ids.shape, -1)  # [B, S, k]
            shape = (self.slots, self.capacity, chosen.shape[-1])
            kept = self._chosen.setdefault(layer, np.zeros(shape, np.int64))
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                kept[first + row, start : start + count] = chosen[row, :count]
        return logits, made[: len(asked)]


def routed(engine: type[OnnxRuntimeExecutor], bundle: Bundle) -> type[OnnxRuntimeExecutor]:
    """That executor, keeping what routers choose where the bundle has any."""
    if not bundle.manifest.get("experts"):
        return engine
    made = type(f"Routed{engine.__name__}", (RoutedExecutor, engine), {})
    return cast("type[OnnxRuntimeExecutor]", made)


def routes_of(executor: Executor, slot: int, start: int, end: int) -> Routes:
    """What was chosen for these places of a slot; nothing where there is no router to see."""
    return executor.routes(slot, start, end) if isinstance(executor, RoutedExecutor) else {}


def _add_routers(model: ir.Model) -> dict[int, str]:
    """Make outputs of the choices; returns their names by layer."""
    found = {}
    for node in model.graph:
        layer = str(node.name).partition("/")[0].removeprefix("layers.")
        if node.op_type == "TopK" and layer.isdigit():
            model.graph.outputs.append(node.outputs[1])
            found[int(layer)] = str(node.outputs[1].name)
    return dict(sorted(found.items()))


class Follow(TorchFunctionMode):
    """Makes the n-th router choose what `routes` says of the n-th layer that has one.

    Keeps each router's scores [S, E], by layer. A router is a topk of one of these sizes:
    `sizes` are pairs (experts chosen, experts there are).
    """

    def __init__(self, routes: Routes, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scores: dict[int, NDArray[np.float64]] = {}
        self._routes, self._sizes = dict(routes), set(sizes)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever PyTorch returns
        del types
        found = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return found
        scores, own = args[0], found[1]
        if (own.shape[-1], scores.shape[-1]) not in self._sizes:
            return found
        layer = next((layer for layer in self._routes if layer not in self.scores), None)
        if layer is None:
            raise GraphError(
                f"the module has more routers than the graph, which has {len(self._routes)} "
                "(layers' topk of experts)"
            )
        self.scores[layer] = scores.detach().double().numpy().reshape(-1, scores.shape[-1])
        chosen = torch.from_numpy(self._routes[layer]).reshape(own.shape)
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))
