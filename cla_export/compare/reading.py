"""What reading a bundle's graph shows to be wrong, which running it for a while may not.

1. Its sharing. Executors bind past and present to one buffer, so a layer that reads a cache from
   before this call's write computes the right thing there, and another thing elsewhere.
2. Its weights and RoPE tables. No text has every token of a large vocabulary, nor every position.
"""

import numpy as np
import onnx_ir as ir

from cla_export.bundle import Bundle
from cla_export.errors import GraphError
from cla_export.graph_reading import read_graph
from cla_export.models.cla import ClaDecoder


def graph_faults(bundle: Bundle, model: ClaDecoder) -> list[str]:
    """A sentence for each contradiction between the graph and the layout, or the reference."""
    return [*_sharing(bundle), *_weights(bundle, model)]


def _sharing(bundle: Bundle) -> list[str]:
    try:
        _, found, _, _ = read_graph(bundle.graph)
    except GraphError as error:
        return [str(error)]
    if found == bundle.layout:
        return []
    return [f"the graph shares KV as {found.describe()}; expected {bundle.layout.describe()}"]


def _weights(bundle: Bundle, model: ClaDecoder) -> list[str]:
    """Initialisers are compared exactly with what they are named after; one is read at a time."""
    faults = []
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in ir.load(bundle.graph).graph.initializers.items():
        if name not in expected or value.const_value is None:
            continue
        got = value.const_value.numpy()
        want = expected[name].detach().numpy().astype(got.dtype)
        if got.shape != want.shape:
            faults.append(f"{name} is {list(got.shape)}; expected {list(want.shape)}")
        elif not np.array_equal(got, want, equal_nan=True):
            faults.append(
                f"{name}: {int((got != want).sum())} of {got.size} values are not the model's"
            )
    return faults
