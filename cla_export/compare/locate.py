"""Find the first tensor that differs: replay a failed case with every layer's values marked.

Calls are compared in the order they ran, and within a call layer by layer: query, new key and value
(of owners), attention output, layer output. The first one beyond tolerance is where to look.
"""

import numpy as np

from cla_export.bundle import Bundle
from cla_export.compare.cases import SLOTS, Case
from cla_export.compare.marks import marked
from cla_export.compare.probe import torch_tensors
from cla_export.compare.report import Divergence
from cla_export.compare.runners import ExecutorRunner, fill_with_garbage, rows_of
from cla_export.compare.thresholds import Threshold
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.models.cla import ClaDecoder

_WITHIN = 3.0  # a value inside the network may be this much further off than what comes out
_ENOUGH = 32  # tokens whose mean error says something


def locate(
    bundle: Bundle,
    model: ClaDecoder,
    rounded: ClaDecoder | None,
    case: Case,
    threshold: Threshold,
    capacity: int,
    engine: type[OnnxRuntimeExecutor] = OnnxRuntimeExecutor,
) -> Divergence | None:
    """The first value over tolerance in a replay of `case`; None if no layer's values differ.

    `rounded` is the model in the bundle's dtype, whose own errors set the tolerance.
    """
    executor = marked(engine)(bundle, capacity=capacity, slots=SLOTS)
    fill_with_garbage(executor)
    ExecutorRunner(executor, "marked").run_case(case.feed)
    tokens = rows_of(case.feed)
    expected = [torch_tensors(model, row) for row in tokens]
    noisy = expected if rounded is None else [torch_tensors(rounded, row) for row in tokens]
    first_slot = int(case.feed["first_slot"])
    for number, call in enumerate(executor.calls):
        for layer, role in call.rows[0]:
            for row, made in enumerate(call.rows):
                index, start = call.first_slot + row - first_slot, call.starts[row]
                whole = expected[index][layer, role]
                rounding = noisy[index][layer, role]
                tolerance = _WITHIN * threshold.of(whole, rounding)
                got = made[layer, role]
                reference = whole[start : start + len(got)]
                error = np.abs(got - reference)
                error[~np.isfinite(error)] = np.inf
                worst = int(error.argmax())
                few = len(got) < _ENOUGH
                typical = few or error.mean() <= threshold.mean_of(whole, rounding)
                if error.flat[worst] <= tolerance and typical:
                    continue
                token, channel = divmod(worst, error.shape[1])
                return Divergence(
                    case=case.name,
                    call=number,
                    layer=layer,
                    group=bundle.layout.group_of(layer),
                    role=role,
                    row=row,
                    position=start + token,
                    channel=channel,
                    got=float(got.flat[worst]),
                    expected=float(reference.flat[worst]),
                    error=float(error.flat[worst]),
                    tolerance=tolerance,
                )
    return None
