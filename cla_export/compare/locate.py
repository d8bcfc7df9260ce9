"""Find the first tensor that differs, by marking every layer's outputs in a copy of the graph.

One prompt runs through both sides. In PyTorch, hooks catch what enters each o_proj (the attention
output) and what leaves each layer; in the graph, the same values become extra outputs. Names come
from the rewriter: nodes of layer i are called `layers.{i}/...`, attention nodes carry `cla.layer`.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.compare.cases import Case
from cla_export.compare.report import Divergence
from cla_export.compare.thresholds import Threshold
from cla_export.models.cla import ClaDecoder
from cla_export.rewrite.group_attention import LAYER

_LENGTH = 64  # tokens of the prompt; enough to show where, short enough to keep every tensor


def locate(
    bundle: Bundle,
    model: ClaDecoder,
    rounded: ClaDecoder | None,
    case: Case,
    threshold: Threshold,
) -> Divergence | None:
    """The first attention or layer output over tolerance; None if only later tensors differ.

    `rounded` is the model in the bundle's dtype, whose own errors set the tolerance.
    """
    tokens = case.feed["tokens"][:1, :_LENGTH]
    expected = _torch_tensors(model, tokens)
    noisy = expected if rounded is None else _torch_tensors(rounded, tokens)
    got = _graph_tensors(bundle, tokens)
    for name in expected:
        if name not in got:
            continue
        reference = expected[name]
        noise = float(np.abs(noisy[name] - reference).max())
        tolerance = threshold.floor + threshold.factor * noise
        error = np.abs(got[name].reshape(reference.shape) - reference)
        error[~np.isfinite(error)] = np.inf
        if float(error.max()) > tolerance:
            layer = int(name.split(".")[1])
            position = int(np.unravel_index(int(error.argmax()), error.shape)[0])
            return Divergence(
                layer=layer,
                group=bundle.layout.group_of(layer),
                tensor=name,
                error=float(error.max()),
                tolerance=tolerance,
                detail=f"prompt of {tokens.shape[1]} tokens, largest error at position {position}",
            )
    return None


@torch.inference_mode()
def _torch_tensors(model: ClaDecoder, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Name -> [S, width], in execution order."""
    found: dict[str, NDArray[np.float32]] = {}
    handles = []

    def catch(name: str) -> Any:  # noqa: ANN401  # a hook takes whatever PyTorch passes
        def hook(_module: Any, arguments: Any, output: Any = None) -> None:  # noqa: ANN401
            value = arguments[0] if output is None else output
            found[name] = value[0].float().numpy().copy()

        return hook

    for index, layer in enumerate(model.model.layers):
        o_proj = layer.get_submodule("self_attn.o_proj")
        handles.append(o_proj.register_forward_pre_hook(catch(f"layers.{index}.attention")))
        handles.append(layer.register_forward_hook(catch(f"layers.{index}.output")))
    try:
        model(torch.from_numpy(tokens), torch.arange(tokens.shape[1])[None])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _graph_tensors(bundle: Bundle, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """The same tensors out of a copy of the bundle's graph, [S, width]."""
    import onnxruntime

    model = ir.load(bundle.graph)
    marked = _mark(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.folder)
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(list(marked.values()), _first_prompt(session, tokens))
    return {
        name: _tokens_first(value[0].astype(np.float32))
        for name, value in zip(marked, values, strict=True)
    }


def _tokens_first(value: NDArray[np.float32]) -> NDArray[np.float32]:
    if value.ndim == 3:  # [H, S, D], a standard Attention's
        value = value.transpose(1, 0, 2)
    return value.reshape(value.shape[0], -1)


def _mark(model: ir.Model) -> dict[str, str]:
    """Add outputs to the graph; returns our name -> the graph's, in execution order."""
    marked: dict[str, str] = {}
    last: dict[int, ir.Value] = {}
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        if LAYER in node.metadata_props:
            values[f"layers.{node.metadata_props[LAYER]}.attention"] = node.outputs[0]
        elif (name := str(node.name)).startswith("layers."):
            last[int(name.split("/", maxsplit=1)[0].split(".")[1])] = node.outputs[0]
    for layer, value in last.items():
        values[f"layers.{layer}.output"] = value
    for name, value in values.items():
        marked[name] = str(value.name)
        if value not in model.graph.outputs:
            model.graph.outputs.append(value)
    return marked


def _first_prompt(session: Any, tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:  # noqa: ANN401
    length = tokens.shape[1]
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": tokens,
        "attention_mask": np.ones((1, length), np.int64),
        "write_indices": np.zeros(1, np.int64),
        "kv_lengths": np.full(1, length, np.int64),
    }
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    wanted: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        if value.name in feeds:
            wanted[value.name] = feeds[value.name]
        else:
            shape = (1, value.shape[1], length, value.shape[3])
            wanted[value.name] = np.zeros(shape, types[value.type])
    return wanted
