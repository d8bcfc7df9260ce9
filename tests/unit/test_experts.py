"""Mixtures of experts as a graph has them: all computed and weighed, or ONNX Runtime's operator."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export.interleaving import INTERLEAVED, interleave, separate
from cla_export.lower.fuse_experts import fuse_experts
from cla_export.lower.quantize_experts import quantize_experts
from cla_export.models.experts import Experts, swiglu, weigh_all
from cla_export.quantization import PACKED, SCALES, WEIGHT, Quantization
from cla_export.rewrite.simplify import simplify
from cla_export.trace import trace_module

EXPERTS, HIDDEN, WIDTH, VOCAB = 6, 16, 12, 23


class Mixture(nn.Module):
    """Tokens through `chosen` experts each, whose shares sum to one or less."""

    def __init__(
        self,
        chosen: int,
        *,
        gate: str = "silu",
        whole: bool = True,
        width: int = WIDTH,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen, self.whole = chosen, whole
        self.gate = gate
        self.table = nn.Embedding(VOCAB, hidden)
        self.router = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = Experts(EXPERTS, hidden, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.table(input_ids) + 0.01 * position_ids[..., None]
        tokens = x.flatten(0, 1)
        shares, chosen = (8 * self.router(tokens)).softmax(-1).topk(self.chosen)
        if self.whole:
            shares = shares / shares.sum(-1, keepdim=True)
        if self.gate == "silu":
            return self.experts(tokens, chosen, shares).view(x.shape)
        up, down = self.experts.gate_up_proj.mT, self.experts.down_proj.mT
        return weigh_all(tokens, chosen, shares, up, down, gelu).view(x.shape)


def gelu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.gelu(gate) * up


def graph_of(module: nn.Module) -> ir.Model:
    model = trace_module(module)
    simplify(model)
    for name, value in module.state_dict().items():
        found = model.graph.initializers[name]
        found.const_value = ir.tensor(value.numpy(), name=name)
    return model


def run(model: ir.Model, ids: Tensor, positions: Tensor) -> np.ndarray:
    model.opset_imports[""] = 23
    model.ir_version = 10
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feed = {"input_ids": ids.numpy(), "position_ids": positions.numpy()}
    made: np.ndarray = session.run(None, feed)[0]
    return made


@pytest.mark.parametrize(("chosen", "whole"), [(1, False), (2, True), (3, False), (6, True)])
def test_all_experts_weighed_and_the_chosen_alone_are_the_same(chosen: int, whole: bool) -> None:
    """Beside PyTorch's loop over the chosen ones; routers so sharp that shares come close to 0."""
    module = Mixture(chosen, whole=whole)
    graph = graph_of(module)
    fused = graph.clone()
    assert fuse_experts(fused) == 1
    operators = [node.op_type for node in fused.graph]
    assert operators.count("MoE") == 1
    assert "Sigmoid" not in operators
    for batch, length in ((1, 1), (1, 9), (3, 4)):
        ids = torch.arange(batch * length).view(batch, length) * 7 % VOCAB
        positions = torch.arange(length).expand(batch, -1)
        with torch.inference_mode():
            expected = module(ids, positions).numpy()
        for model in (graph, fused):
            assert np.abs(run(model, ids, positions) - expected).max() < 1e-5


def test_experts_that_are_not_swiglu_stay_as_they_are() -> None:
    graph = graph_of(Mixture(2, gate="gelu"))
    before = [node.op_type for node in graph.graph]
    assert fuse_experts(graph) == 0
    assert [node.op_type for node in graph.graph] == before


def test_quantised_experts_are_those_that_their_weights_stand_for() -> None:
    """In 4 bits the kernel computes in float32."""
    how, module = Quantization(4), Mixture(2, width=32, hidden=64)
    nn.init.normal_(module.router.weight, std=0.05)
    graph = graph_of(module)
    assert fuse_experts(graph) == 1
    weights = {name: getattr(module.experts, name) for name in ("gate_up_proj", "down_proj")}
    for name in list(graph.graph.initializers):
        if name.startswith("experts."):
            graph.graph.initializers[name].const_value = None
    assert quantize_experts(graph, how) == 1
    for name, weight in weights.items():
        whole, suffix = weight.detach().numpy(), ""
        if name == "gate_up_proj":
            whole, suffix = interleave(whole), INTERLEAVED
        packed, scales = how.pack_experts(whole)
        for part, array in ((PACKED, packed), (SCALES, scales)):
            value = graph.graph.initializers[f"experts.{name}{suffix}{part}"]
            assert value.metadata_props[WEIGHT] == f"experts.{name}"
            assert list(value.shape or ()) == list(array.shape)
            value.const_value = ir.tensor(array, name=value.name)
        meant = how.unpack_experts(packed, scales)
        weight.data = torch.from_numpy(separate(meant) if suffix else meant)
    ids, positions = torch.arange(8)[None] % VOCAB, torch.arange(8)[None]
    with torch.inference_mode():
        expected = module(ids, positions).numpy()
    assert np.abs(run(graph, ids, positions) - expected).max() < 1e-5 * np.abs(expected).max()


def test_experts_of_no_whole_blocks_stay_as_they_are() -> None:
    graph = graph_of(Mixture(2))
    fuse_experts(graph)
    for value in graph.graph.initializers.values():
        value.const_value = None
    before = [node.op_type for node in graph.graph]
    assert quantize_experts(graph, Quantization(8)) == 0
    assert [node.op_type for node in graph.graph] == before


def test_gates_and_ups_interleaved() -> None:
    weight = np.arange(2 * 6 * 5).reshape(2, 6, 5)
    made = interleave(weight)
    assert np.array_equal(separate(made), weight)
    for expert in range(2):
        assert [row[0] // 5 - 6 * expert for row in made[expert]] == [0, 3, 1, 4, 2, 5]
    both = torch.randn(3, 6)
    gate, up = both.chunk(2, -1)
    assert torch.equal(swiglu(both), F.silu(gate) * up)
