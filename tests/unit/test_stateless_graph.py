"""A graph that somebody else traced: sharing is discovered, caches are added, both are run."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typer.testing import CliRunner

from cla_export import cli
from cla_export.errors import BadInput, CheckFailed, GraphError, RunError
from cla_export.stateless_graph import rewrite_graph

VOCAB, WIDTH, HEADS, DIM = 53, 24, 3, 8


class Sandwich(nn.Module):
    """A decoder unlike any of ours: learned positions, LayerNorm, and sharing in its own way.

    Layers 0 and 3 read one pair of keys and values, layers 1 and 2 another, of one head.
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(places, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.asks = nn.ModuleList(nn.Linear(WIDTH, HEADS * DIM) for _ in range(4))
        self.outs = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in range(4))
        self.tells = nn.ModuleList(nn.Linear(WIDTH, 2 * DIM) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(position_ids)
        made = []
        for layer, pair in enumerate((0, 1, 1, 0)):
            h = self.norms[layer](x)
            if pair == len(made):
                made.append(self.tells[pair](h).unsqueeze(1).chunk(2, -1))
            q = self.asks[layer](h).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, *made[pair], is_causal=True, enable_gqa=True)
            x = x + torch.tanh(self.outs[layer](y.transpose(1, 2).flatten(2)))
        return self.head(x)


def trace(path: Path, places: int = 32) -> Path:
    torch.manual_seed(0)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Sandwich(places).eval(), (ids, torch.arange(5).repeat(2, 1)), path,
        dynamo=True, opset_version=23,
        input_names=["input_ids", "position_ids"], output_names=["logits"],
        dynamic_shapes=(axes, axes), external_data=True,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def stateless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace(tmp_path_factory.mktemp("foreign") / "sandwich.onnx")


@pytest.mark.parametrize("target", ["onnxruntime", "portable", "tensorrt"])
def test_rewritten(stateless: Path, tmp_path: Path, target: str) -> None:
    done = rewrite_graph(stateless, tmp_path / "out.onnx", target=target)
    assert done.layout.kv_owner == (0, 1, 1, 0)
    assert done.layout.kv_heads == (1, 1, 1, 1)
    assert done.error is not None and done.largest is not None
    assert done.error < 1e-5 * done.largest
    graph = ir.load(done.path).graph
    caches = [v.name for v in graph.inputs if str(v.name).startswith("past_key_values.")]
    assert caches == [f"past_key_values.{g}.{part}" for g in (0, 1) for part in ("key", "value")]
    onnx.load(done.path)  # weights are found beside it
    assert sorted(p.name for p in tmp_path.iterdir()) in (
        ["out.onnx"],
        ["out.onnx", "out.onnx.data"],
    )


def test_the_command(stateless: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli.app, ["rewrite", str(stateless), str(tmp_path / "a.onnx")])
    assert run.exit_code == 0 and "2 groups" in run.output, run.output
    run = CliRunner().invoke(
        cli.app, ["rewrite", str(stateless), str(tmp_path / "b.onnx"), "--json", "--no-check"]
    )
    shown = json.loads(run.stdout)
    assert shown["kv_layout"]["kv_owner"] == [0, 1, 1, 0]
    assert shown["error"] is None


def test_what_is_refused(stateless: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        rewrite_graph(tmp_path / "nothing.onnx", tmp_path / "out.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(BadInput, match="not an ONNX file"):
        rewrite_graph(tmp_path / "text.onnx", tmp_path / "out.onnx")
    (tmp_path / "there.onnx").write_text("")
    with pytest.raises(BadInput, match="exists already"):
        rewrite_graph(stateless, tmp_path / "there.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_weights_outside_of_the_folder_are_not_opened(
    stateless: Path, tmp_path: Path, kind: str
) -> None:
    """They are there and right, and still not opened."""
    (tmp_path / "in").mkdir()
    outside = tmp_path / "weights.data"
    shutil.copy(stateless.with_name("sandwich.onnx.data"), outside)
    place = {"parent": "../weights.data", "absolute": str(outside), "link": "linked.data"}[kind]
    (tmp_path / "in" / "linked.data").symlink_to(outside)
    model = onnx.load(stateless, load_external_data=False)
    weights = [w for w in model.graph.initializer if w.external_data]
    for weight in weights:
        next(e for e in weight.external_data if e.key == "location").value = place
    trap = tmp_path / "in" / "trap.onnx"
    trap.write_bytes(model.SerializeToString())
    with pytest.raises(BadInput) as caught:
        rewrite_graph(trap, tmp_path / "out.onnx")
    assert str(caught.value) == (
        f"{trap}: weight {weights[0].name} is kept in {place!r}, outside of the graph's own "
        "folder; such files are not opened: save the graph again with its weights beside it"
    )


@pytest.mark.parametrize("inside", [False, True], ids=["initialiser", "constant node"])
def test_large_tables_never_go_into_the_graphs_own_file(
    stateless: Path, tmp_path: Path, inside: bool
) -> None:
    """A protobuf file ends at 2 GB; what is large is kept beside it, wherever it came from."""
    model = ir.load(stateless)
    value = next(v for n, v in model.graph.initializers.items() if n.endswith("places.weight"))
    table = np.random.default_rng(0).normal(size=(20_000, WIDTH)).astype(np.float32)
    tensor = ir.tensor(table, name=value.name)
    if inside:
        made = ir.Value(name="table", type=value.type, shape=ir.Shape(table.shape))
        attribute = {"value": ir.AttrTensor("value", tensor)}
        model.graph.insert_before(
            model.graph[0], ir.node("Constant", [], attribute, outputs=[made])
        )
        value.replace_all_uses_with(made)
        del model.graph.initializers[str(value.name)]
    else:
        value.const_value, value.shape = tensor, ir.Shape(table.shape)
    ir.save(model, tmp_path / "large.onnx", external_data="large.data")
    done = rewrite_graph(tmp_path / "large.onnx", tmp_path / "out.onnx")
    assert done.path.stat().st_size < 50_000
    assert (tmp_path / "out.onnx.data").stat().st_size > table.nbytes


def test_other_names_of_inputs_are_named(stateless: Path, tmp_path: Path) -> None:
    model = ir.load(stateless)
    model.graph.inputs[1].name = "places"
    ir.save(model, tmp_path / "odd.onnx")
    with pytest.raises(GraphError, match="no input 'position_ids'"):
        rewrite_graph(tmp_path / "odd.onnx", tmp_path / "out.onnx")
    model = ir.load(stateless)
    model.graph.outputs[0].name = "scores"
    ir.save(model, tmp_path / "odd.onnx")
    with pytest.raises(GraphError, match=r"its outputs are \['scores'\]"):
        rewrite_graph(tmp_path / "odd.onnx", tmp_path / "out.onnx")


def test_a_check_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    """Fewer places than the check has tokens: ONNX Runtime fails, and says so through us."""
    path = trace(tmp_path / "short.onnx", places=8)
    with pytest.raises(RunError, match="failed to run 16 tokens"):
        rewrite_graph(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    rewrite_graph(path, tmp_path / "out.onnx", check=False)


def test_a_rewritten_graph_that_differs_is_not_written(
    stateless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cla_export import stateless_graph

    def wrong(model: ir.Model, weights: dict, source: Path) -> None:
        weights = {n: ir.tensor(1.01 * w.numpy(), name=n) for n, w in weights.items()}
        attach(model, weights, source)

    attach = stateless_graph._attach
    monkeypatch.setattr(stateless_graph, "_attach", wrong)
    with pytest.raises(CheckFailed, match="nothing was written"):
        rewrite_graph(stateless, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
