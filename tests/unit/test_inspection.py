"""Inspection of configs, model folders, graphs and bundles, against arithmetic done by hand."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from cla_export.bundle import write_manifest
from cla_export.errors import BadInput, BundleError, GraphError, LayoutError
from cla_export.inspection import Inspection, inspect
from cla_export.layout import KVLayout, identity, uniform
from cla_export.views.inspection import map_lines, render

PAPER: dict[str, Any] = {  # H128-MQA-CLA2 of the paper's 1B scale
    "model_type": "cla",
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "intermediate_size": 5472,
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "kv_owner": list(uniform(20, 2)),
}
TINY = PAPER | {
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "head_dim": 4,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "kv_owner": [0, 0, 2, 2],
}
S, F = "sliding_attention", "full_attention"
GEMMA_3N = {
    "model_type": "gemma3n",
    "text_config": {
        "hidden_size": 2048,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
        "layer_types": [S, S, S, S, F] * 7,
    },
}
HUNYUAN = {  # Hunyuan-Large
    "model_type": "hunyuan",
    "vocab_size": 128512,
    "num_hidden_layers": 64,
    "hidden_size": 6400,
    "intermediate_size": 18304,
    "num_experts": 16,
    "moe_topk": 1,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "use_cla": True,
    "cla_share_factor": 2,
    "torch_dtype": "bfloat16",
}


def folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F16") -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def shown(inspection: Inspection, width: int = 80) -> str:
    console = Console(width=width, no_color=True, record=True, file=io.StringIO())
    render(inspection, console)
    return console.export_text()


# Configs and model folders


def test_the_papers_1b_model(tmp_path: Path) -> None:
    found = inspect(folder(tmp_path / "paper", PAPER))
    q_and_o, mlp, kv = 2 * 2048 * 2048, 3 * 2048 * 5472, 2 * 2048 * 128
    norms = 20 * 2 * 2048 + 2048
    matrices = 50304 * 2048 + 20 * (q_and_o + mlp) + 10 * kv
    assert round(matrices / 1e6, 1) == 948.4  # the paper's count
    assert (found.kind, found.name, found.model_type) == ("config", "paper", "cla")
    assert (found.dtype, found.dtype_source) == ("bfloat16", "assumed: config.json names none")
    assert found.context == 2048
    core = 20 * 2 * 2 * 16 * 128 * 2048  # QK and PV, 2 FLOPs a multiply-add, per layer
    assert found.own.cache_bytes_per_token == found.own.kv_activation_bytes_per_token == 5120
    assert found.own.parameters == matrices + norms
    assert found.own.flops_per_token == 2 * matrices + core
    assert found.own.cache_inputs == 20
    assert found.dense.cache_bytes_per_token == 10240
    assert found.dense.parameters == matrices + norms + 10 * kv
    assert found.dense.flops_per_token == 2 * (matrices + 10 * kv) + core
    assert found.dense.cache_inputs == 40
    assert found.ok


def test_the_context_of_the_flops_can_be_said_and_is_checked(tmp_path: Path) -> None:
    path = folder(tmp_path / "paper", PAPER)
    at = {context: inspect(path, context=context).own.flops_per_token for context in (1, 4096)}
    assert at[4096] - at[1] == 20 * 4 * 16 * 128 * 4095  # type: ignore[operator]
    for context in (0, 4097):
        with pytest.raises(BadInput, match="expected 1 to 4096"):
            inspect(path, context=context)


@pytest.mark.parametrize(
    ("said", "dtype", "source"),
    [
        ({"dtype": "float16"}, "float16", "config.json dtype"),
        ({"torch_dtype": "torch.float32"}, "float32", "config.json torch_dtype"),
        ({"text_config": {"dtype": "float32"}}, "float32", "config.json dtype"),
        ({"dtype": None}, "bfloat16", "assumed: config.json names none"),
    ],
)
def test_the_dtype_and_who_said_it(
    tmp_path: Path, said: dict[str, Any], dtype: str, source: str
) -> None:
    found = inspect(folder(tmp_path / "m", PAPER | said) / "config.json")
    assert (found.dtype, found.dtype_source) == (dtype, source)
    assert found.own.cache_bytes_per_token == 10 * 2 * 128 * (4 if dtype == "float32" else 2)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="torch_dtype is 'auto'; expected one of float32"):
        inspect(folder(tmp_path / "m", PAPER | {"torch_dtype": "auto"}))


def test_a_model_folder_is_compared_with_its_config(tmp_path: Path) -> None:
    path = folder(tmp_path / "tiny", TINY)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8)}
    for i in range(4):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "o_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (8, 8)
        if i in (0, 2):
            for name in ("k_proj", "v_proj"):
                shapes[f"{layer}self_attn.{name}.weight"] = (4, 8)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (8,)
        for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
    shapes["model.norm.weight"] = (8,)
    write_weights(path / "model.safetensors", shapes)
    found = inspect(path)
    assert (found.kind, found.dtype, found.dtype_source) == ("model", "float16", "stored weights")
    assert found.own.parameters == sum(int(np.prod(shape)) for shape in shapes.values())
    assert found.own.cache_bytes_per_token == 2 * 2 * 4 * 2
    assert found.weight_bytes == {"float16": 2 * found.own.parameters}
    assert f"weights: {2 * found.own.parameters:,} B float16" in shown(found)
    folder(path, TINY | {"kv_owner": [0, 0, 0, 0]})
    with pytest.raises(BadInput, match=r"unexpected weight model\.layers\.2\.self_attn\.k_proj"):
        inspect(path)


def test_an_unknown_family_shows_its_layout_and_says_what_it_cannot(tmp_path: Path) -> None:
    gemma = inspect(folder(tmp_path / "gemma", GEMMA_3N | {"model_type": "gemma3000"}))
    assert gemma.own.parameters is gemma.own.flops_per_token is gemma.context is None
    assert gemma.own.cache_bytes_per_token == 20 * 2 * 2 * 256 * 2
    assert gemma.dense.cache_bytes_per_token == 35 * 2 * 2 * 256 * 2
    assert "model_type is 'gemma3000', which is not supported" in gemma.notes[0]
    sharing = inspect(folder(tmp_path / "sharing", HUNYUAN | {"model_type": "hunyuan9000"}))
    assert sharing.own.cache_bytes_per_token == 32 * 2 * 8 * 80 * 2
    assert "not known" in shown(sharing)


def test_hunyuan_large_is_as_large_as_its_report_says(tmp_path: Path) -> None:
    """389 billion parameters, of which a token goes through 52 (Sun et al. 2024)."""
    found = inspect(folder(tmp_path / "hunyuan", HUNYUAN), context=1)
    assert found.own.cache_bytes_per_token == 32 * 2 * 8 * 80 * 2
    assert found.own.parameters is not None
    assert found.own.flops_per_token is not None
    assert round(found.own.parameters / 1e9) == 389
    embeddings = HUNYUAN["vocab_size"] * HUNYUAN["hidden_size"]  # a lookup, which is no product
    assert round((found.own.flops_per_token / 2 + embeddings) / 1e9) == 52


def test_a_known_family_with_a_wrong_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="layer 1: kv_owner is 2"):
        inspect(folder(tmp_path / "m", TINY | {"kv_owner": [0, 2, 2, 2]}))
    del (config := dict(TINY))["intermediate_size"]
    with pytest.raises(BadInput, match="key 'intermediate_size' is missing"):
        inspect(folder(tmp_path / "m", config))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing", None, "does not exist"),
        ("notes.txt", "hello", "is a file of another kind"),
        ("bad.onnx", "hello", "not a readable ONNX model"),
        ("empty/x", "", "is a file of another kind"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        inspect(tmp_path / name)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it has no config\.json"):
        inspect(tmp_path)


# Graphs

OWNERS = (0, 1, 0, 1, 4, 1)  # groups not contiguous
LAYOUT = KVLayout.create(OWNERS, 2, 16, (None, 8, None, 8, None, 8))


def build(path: Path, forms: tuple[str, ...], **wrong: bool) -> Path:
    """A decoder's attention skeleton; forms[g] is scatter or gqa, or all are stateless.

    The dimensions: 4 query heads, 2 KV heads of 16; group 1 has a window of 8.
    """
    nodes: list[onnx.NodeProto] = []
    weight = numpy_helper.from_array(np.zeros((64, 64), np.float32), "weight")
    zero = numpy_helper.from_array(np.array([0], np.int64), "zero")
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    eight = numpy_helper.from_array(np.array(8, np.int64), "eight")
    packed = numpy_helper.from_array(np.array([0, 0, 2, 16], np.int64), "kv_shape")
    info = helper.make_tensor_value_info
    inputs = [info("x0", TensorProto.FLOAT, ["batch", "sequence", 64])]
    outputs = [info("x6", TensorProto.FLOAT, ["batch", "sequence", 64])]
    inputs += [
        info("write_indices", TensorProto.INT64, ["batch"]),
        info("seqlens", TensorProto.INT32, ["batch"]),
        info("total", TensorProto.INT32, []),
        info("mask_a", TensorProto.INT64, ["batch", 1, 1, "capacity"]),
        info("mask_b", TensorProto.INT64, ["batch", 1, "sequence", 1]),
    ]
    infos: list[onnx.ValueInfoProto] = []

    def node(op: str, inputs: list[str], outputs: list[str], domain: str = "", **at: Any) -> None:
        nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **at))

    groups = sorted(set(OWNERS))
    node("Sub", ["mask_b", "eight"], ["oldest"])
    node("Greater", ["mask_a", "oldest"], ["window"])
    for layer, owner in enumerate(OWNERS):
        group = groups.index(owner)
        form, window = forms[group], group == 1
        past, present = (
            [f"{tense}.{group}.{part}" for part in ("key", "value")]
            for tense in ("past_key_values", "present")
        )
        if layer == owner:
            if form != "stateless":
                cache = ["batch", 2, "capacity", 16]
                inputs += [info(name, TensorProto.FLOAT, cache) for name in past]
                outputs += [info(name, TensorProto.FLOAT, cache) for name in present]
            for part in ("k", "v"):
                node("MatMul", [f"x{layer}", "weight"], [f"{part}_wide{group}"])
                node("Slice", [f"{part}_wide{group}", "zero", "kv_end", "two"], [f"{part}{group}"])
                node("Reshape", [f"{part}{group}", "kv_shape"], [f"{part}_split{group}"])
                node(
                    "Transpose",
                    [f"{part}_split{group}"],
                    [f"{part}_heads{group}"],
                    perm=[0, 2, 1, 3],
                )
                shape = ["batch", 2, "sequence", 16]
                infos.append(info(f"{part}_heads{group}", TensorProto.FLOAT, shape))
            new = [f"k_heads{group}", f"v_heads{group}"]
            if form == "scatter":
                for i in (0, 1):
                    node("TensorScatter", [past[i], new[i], "write_indices"], [present[i]], axis=2)
            elif form == "gqa":
                node("Slice", [f"k{group}", "zero", "zero", "one"], [f"nothing{group}"])
        y = f"y{layer}"
        if form == "gqa":
            kv = [f"nothing{group}"] * 2
            caches, made = present, [y]
            if layer == owner or wrong.get("appends"):
                kv = [f"k{group}", f"v{group}"]
            if layer == owner:
                caches, made = past, [y, *present]
            lengths = ["seqlens", "total"]
            heads: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
            if window:
                heads["local_window_size"] = 8
            domain = "com.microsoft"
            node(
                "GroupQueryAttention", [f"x{layer}", *kv, *caches, *lengths], made, domain, **heads
            )
        else:
            split = {"q_num_heads": 4, "kv_num_heads": 2} if form == "3d" else {}
            node("Reshape", [f"x{layer}", "q_shape"], [f"q_split{layer}"])
            node("Transpose", [f"q_split{layer}"], [f"q{layer}"], perm=[0, 2, 1, 3])
            read = present if form == "scatter" else [f"k_heads{group}", f"v_heads{group}"]
            extra = ["window"] if window and form == "scatter" else []
            if wrong.get("strange_mask") and extra:
                extra = ["mask_a"]
            node("Attention", [f"q{layer}", *read, *extra], [f"{y}_heads"], is_causal=1, **split)
            node("Transpose", [f"{y}_heads"], [f"{y}_split"], perm=[0, 2, 1, 3])
            node("Reshape", [f"{y}_split", "y_shape"], [y])
        node("Add", [f"x{layer}", y], [f"x{layer + 1}"])
    constants = {"kv_end": [32], "two": [2], "q_shape": [0, 0, 4, 16], "y_shape": [0, 0, 64]}
    initializers = [weight, zero, one, eight, packed] + [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers, value_info=infos)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    file = path / "model.onnx"
    onnx.save(
        model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    (path / "model.onnx.data").unlink()  # the weights are never opened
    return file


@pytest.mark.parametrize(
    ("forms", "operators"),
    [
        (("scatter", "scatter", "scatter"), {"Attention": 6}),
        (("gqa", "gqa", "gqa"), {"GroupQueryAttention": 6}),
        (("gqa", "scatter", "gqa"), {"GroupQueryAttention": 3, "Attention": 3}),
    ],
)
def test_caches_of_a_graph(
    tmp_path: Path, forms: tuple[str, ...], operators: dict[str, int]
) -> None:
    found = inspect(build(tmp_path, forms))
    assert found.layout == LAYOUT
    assert found.graph is not None
    assert (found.kind, found.graph.stage) == ("graph", "stateful")
    assert found.graph.attention == operators
    assert found.graph.cache_inputs == 6
    assert (found.dtype, found.dtype_source) == ("float32", "cache inputs of the graph")
    assert found.own.cache_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert found.dense.cache_bytes_per_token == 6 * 2 * 2 * 16 * 4
    assert found.own.parameters is found.own.flops_per_token is None


def test_sharing_in_a_stateless_graph(tmp_path: Path) -> None:
    found = inspect(build(tmp_path, ("stateless",) * 3))
    assert found.layout == KVLayout.create(OWNERS, 2, 16)  # this one has no window
    assert found.graph is not None
    assert (found.graph.stage, found.graph.cache_inputs) == ("stateless", 0)
    assert "no caches are threaded yet" in found.notes[0]


def test_a_mask_that_is_not_understood_is_said(tmp_path: Path) -> None:
    found = inspect(build(tmp_path, ("scatter",) * 3, strange_mask=True))
    assert found.layout == KVLayout.create(OWNERS, 2, 16)
    assert any(note.startswith("layers 1, 3, 5: the mask") for note in found.notes)


def test_graphs_that_break_the_rules(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="appends its own K or V"):
        inspect(build(tmp_path, ("gqa",) * 3, appends=True))
    with pytest.raises(GraphError, match="layer 1 reads no cache though others do"):
        inspect(build(tmp_path, ("scatter", "stateless", "scatter")))
    file = build(tmp_path, ("gqa",) * 3)
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention" and node.output[0] == "y4":
            node.input[3:5] = ["past_key_values.0.key", "past_key_values.0.value"]
    file.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"layers 0 and 4 each write past_key_values\.0\.key"):
        inspect(file)
    for node in model.graph.node:
        node.op_type, node.domain = "Add", ""
    file.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="no Attention or GroupQueryAttention node"):
        inspect(file)


# Bundles


def bundle(path: Path, **changes: Any) -> Path:
    build(path, ("gqa",) * 3)
    config = TINY | {
        "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "kv_owner": list(OWNERS), "sliding_window": 8,
        "layer_types": [F, S, F, S, F, S],
    }  # fmt: skip
    folder(path, config)
    described = {
        "target": "onnxruntime", "dtype": "float32", "kv_layout": LAYOUT.to_json(),
        "limits": {"max_positions": 64, "vocab_size": 61}, "source": {"folder": str(path)},
    }  # fmt: skip
    write_manifest(path, described | changes, lambda *_: None)
    return path


def test_a_bundle_and_its_checks(tmp_path: Path) -> None:
    found = inspect(bundle(tmp_path))
    assert (found.kind, found.target, found.dtype) == ("bundle", "onnxruntime", "float32")
    assert found.layout == LAYOUT
    assert found.ok
    assert [check.ok for check in found.checks] == [True, True, True]
    assert found.checks[0].detail == "6 cache inputs, 2 x 3 groups = 6"
    assert found.own.parameters is not None


def test_a_bundle_that_disagrees_with_itself(tmp_path: Path) -> None:
    other = KVLayout.create((0, 1, 0, 1, 1, 1), 2, 16)
    found = inspect(bundle(tmp_path, kv_layout=other.to_json()))
    assert not found.ok
    assert [check.ok for check in found.checks] == [False, False, False]
    assert found.checks[1].detail == "layer 4: kv_owner is 4 in the graph, 1 in bundle.json"
    assert "FAIL the graph shares as bundle.json says" in shown(found)


def test_a_bundle_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="dtype is 'float12'; expected one of"):
        inspect(bundle(tmp_path, dtype="float12"))
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: missing from the bundle"):
        inspect(tmp_path)


# Views and JSON


def test_json_reads_back(tmp_path: Path) -> None:
    found = inspect(folder(tmp_path / "paper", PAPER))
    data = json.loads(json.dumps(found.to_json()))
    assert KVLayout.from_json(data["layout"]) == found.layout
    assert data["this_model"]["cache_bytes_per_token"] == 5120
    assert data["groups"][3]["layers"] == [6, 7]
    json.dumps(inspect(bundle(tmp_path)).to_json())


def marks(layout: KVLayout, width: int) -> dict[int, list[str]]:
    """Layer -> the marks drawn for it, read off the map by its axis."""
    found: dict[int, list[str]] = {}
    axis: list[int] = []
    for line in map_lines(layout, width)[:-2]:
        if line.startswith("group"):
            first = int(line.split()[2 if "window" in line else 1])
            start = line.index(str(first), 5)
            second = line.split()[-1]
            step = (line.rindex(second) - start) // max(int(second) - first, 1) or 3
            axis = [start + i * step for i in range(layout.num_layers - first)]
            continue
        for i, column in enumerate(axis):
            if column < len(line) and line[column] in "●○":
                found.setdefault(first + i, []).append(line[column])
    return found


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    "owners", [OWNERS, uniform(20, 2), identity(12), uniform(32, 4), (0,) * 90, uniform(70, 7)]
)
def test_every_layer_is_drawn_once(owners: tuple[int, ...], width: int) -> None:
    layout = KVLayout.create(owners, 1, 8)
    assert marks(layout, width) == {
        i: ["●" if owner == i else "○"] for i, owner in enumerate(owners)
    }
    assert all(len(line) <= width for line in map_lines(layout, width)[:-1])  # the legend wraps


def test_the_map_tells_long_regular_runs_in_words() -> None:
    lines = map_lines(KVLayout.create(uniform(64, 2), 1, 8), 80)
    assert len(lines) == 8
    assert "... 28 more groups alike, each 2 layers after the one before" in lines
    assert lines[5].startswith("31 ")


def test_the_map_marks_sliding_windows_and_has_an_ascii_form(tmp_path: Path) -> None:
    layout = inspect(folder(tmp_path / "gemma", GEMMA_3N)).layout
    text = "\n".join(map_lines(layout, 80, ascii_only=True))
    assert "alone  512     OOOO.OOOO.OOOO.OOO................." in text
    assert "18     512     ..................O.oooo.oooo.oooo." in text
    assert "19     full    ...................O....o....o....o" in text
    assert text.isascii()


@pytest.mark.parametrize("width", [60, 80])
def test_the_view_fits_its_width(tmp_path: Path, width: int) -> None:
    for name, config in (("paper", PAPER), ("gemma", GEMMA_3N), ("hunyuan", HUNYUAN)):
        text = shown(inspect(folder(tmp_path / name, config)), width)
        assert max(map(len, text.splitlines())) <= width
    text = shown(inspect(tmp_path / "paper"))
    assert "5,120 B" in text
    assert "50.0 %" in text
    assert "does not shorten attention" in text


def test_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    assert "m[red]" in shown(inspect(folder(tmp_path / "m[red]", PAPER)))


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, cla_export.views.inspection, cla_export.views.planning, "
        "cla_export.views.environment; heavy = 'torch', 'onnx', 'onnx_ir', 'numpy', 'matplotlib'; "
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
