"""A bundle whose routers choose by scores that are a little off, and weigh by the right ones."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cla_export.bundle import Bundle


def tip(bundle: Bundle, folder: Path, by: float) -> Bundle:
    """Copy it to a folder, and raise the last expert's score by that, the others' less."""
    copy = shutil.copytree(bundle.folder, folder)
    model = ir.load(copy / "model.onnx")
    graph = model.graph
    routers = [node for node in graph if node.op_type == "TopK"]
    assert routers
    for node in routers:
        scores, (values, chosen) = node.inputs[0], node.outputs
        assert scores is not None and scores.dtype is not None and scores.shape is not None
        name = f"{node.name}/tilt"
        tilt = np.linspace(0, by, int(scores.shape[-1]), dtype=scores.dtype.numpy())
        graph.initializers[name] = ir.Value(
            name=name,
            type=scores.type,
            shape=ir.Shape(tilt.shape),
            const_value=ir.tensor(tilt, name=name),
        )
        tilted = ir.node("Add", [scores, graph.initializers[name]], name=f"{node.name}/tilted")
        graph.insert_before(node, tilted)
        node.replace_input_with(0, tilted.outputs[0])
        weighed = ir.node("GatherElements", [scores, chosen], {"axis": -1}, name=f"{node.name}/of")
        graph.insert_after(node, weighed)
        weighed.outputs[0].shape, weighed.outputs[0].type = values.shape, values.type
        values.replace_all_uses_with(weighed.outputs[0])
    ir.save(model, copy / "model.onnx")
    return Bundle(copy, bundle.manifest, bundle.layout)
