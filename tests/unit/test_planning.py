"""Plans against arithmetic done by hand, and the figure's data."""

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cla_export.errors import BadInput, MissingEnvironment
from cla_export.layout import KVLayout, identity, uniform
from cla_export.planning import Plan, parse_bytes, plan
from cla_export.spec import ModelSpec
from cla_export.views.planning import plot, render

GIB = 1024**3


def paper(owners: tuple[int, ...] = uniform(20, 2), kv_heads: int = 1, **more: Any) -> ModelSpec:
    """The paper's 1B scale at head dim 128."""
    numbers = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 5472, "q_heads": 16}
    positions = {"max_positions": 2048, "rope_theta": 10000.0, "norm_eps": 1e-6}
    layout = KVLayout.create(owners, kv_heads, 128, more.pop("window", None))
    return ModelSpec("cla", layout, **numbers, **positions, **more)


def parameters(owners: int, kv_heads: int = 1) -> int:
    """Weights by hand: tied embedding, Q and O, K and V of owners, MLP, norms."""
    matrices = 50304 * 2048 + 20 * (2 * 2048**2 + 3 * 2048 * 5472)
    return matrices + owners * 2 * 2048 * 128 * kv_heads + 41 * 2048


def shown(found: Plan, width: int = 80) -> str:
    console = Console(width=width, no_color=True, record=True, file=io.StringIO())
    render(found, console)
    return console.export_text()


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * GIB),
        ("8GB", 8 * 10**9),
        ("512MiB", 512 * 1024**2),
        ("1.5 GiB", 3 * GIB // 2),
        ("80gb", 80 * 10**9),
        ("1TiB", 1024**4),
        ("64kB", 64000),
        ("123456", 123456),
        ("7B", 7),
        (42, 42),
        ("0.1GB", 10**8),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "16 gigs", "1,5GB", "nan", True])
def test_sizes_that_are_refused(text: Any) -> None:
    with pytest.raises(BadInput, match="expected a number with a unit"):
        parse_bytes(text)


def test_an_ambiguous_size_says_so() -> None:
    with pytest.raises(BadInput, match="G alone is ambiguous: say GiB or GB"):
        parse_bytes("16G")


@pytest.mark.parametrize("text", [0, "0GiB", "0.5B"])
def test_no_memory_is_refused(text: str | int) -> None:
    with pytest.raises(BadInput, match="at least one byte"):
        parse_bytes(text)


# Rows


def test_the_papers_1b_model_in_16_gib() -> None:
    found = plan(paper(), "16GiB", 2048, batch=8)
    own, rows = found.own, {row.name: row for row in found.rows}
    assert found.rows[0] is own
    assert own is rows["CLA2"]
    assert found.reserve_bytes == -(-16 * GIB // 20)
    weights = 2 * parameters(10)
    budget = 16 * GIB - found.reserve_bytes - weights
    assert (own.parameters, own.weight_bytes) == (parameters(10), weights)
    assert (own.bytes_per_token, own.bytes_per_slot) == (5120, 5120 * 2048)
    assert own.cache_budget == budget
    assert own.slots == budget // (5120 * 2048) == 1375
    assert own.largest_context == budget // (8 * 5120)
    assert own.fits
    dense = rows["dense"]
    assert (dense.bytes_per_token, dense.weight_bytes) == (10240, 2 * parameters(20))
    groups = {name: row.layout.num_groups for name, row in rows.items()}
    assert groups == {
        "CLA2": 10, "dense": 20, "CLA2-KeepEnds": 11, "CLA2-DenseFront": 11, "CLA2-DenseBack": 11,
        "CLA3 (remainder first)": 7, "CLA3 (remainder last)": 7, "CLA4": 5, "one owner": 1,
    }  # fmt: skip
    for name, row in rows.items():
        assert row.bytes_per_token == groups[name] * 2 * 128 * 2
        assert row.parameters == parameters(groups[name])


def test_dtypes_and_reserve() -> None:
    found = plan(paper(), 8 * 10**9, 1024, dtype="int8", weights_dtype="fp32", reserve=0)
    assert found.own.bytes_per_token == 2560
    assert found.own.weight_bytes == 4 * parameters(10)
    assert found.own.slots == (8 * 10**9 - 4 * parameters(10)) // (2560 * 1024)
    assert plan(paper(), 8 * 10**9, 1024, reserve=0.5).reserve_bytes == 4 * 10**9


def test_a_layout_of_the_models_own() -> None:
    owners = (0, 1, 0, 1, *range(4, 20))
    found = plan(paper(owners), "16GiB", 2048)
    assert found.own.name == "as configured"
    assert found.own.layout.kv_owner == owners
    assert [row.own for row in found.rows].count(True) == 1


def test_fewer_kv_heads_are_offered_where_the_model_has_more() -> None:
    rows = {row.name: row for row in plan(paper(identity(20), 16), "16GiB", 2048).rows}
    assert rows["dense"].own
    assert rows["dense, GQA4"].bytes_per_token == 20 * 2 * 4 * 128 * 2
    assert rows["dense, MQA"].parameters == parameters(20, 1)
    assert not any("QA" in row.name for row in plan(paper(), "16GiB", 2048).rows)


def test_layouts_that_the_windows_rule_out_are_left_out_with_the_reason() -> None:
    windows = [512, None] * 10
    spec = paper((0, 1, 0, 1, *range(4, 20)), window=windows)
    found = plan(spec, "16GiB", 2048)
    names = [row.name for row in found.rows]
    assert "dense" in names
    assert "CLA2" not in names
    assert "window differ" in dict(found.skipped)["CLA2"]
    assert "left out, CLA2" in shown(found)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_short_models_list_each_layout_once(layers: int) -> None:
    rows = plan(paper(identity(layers)), "16GiB", 128).rows
    assert len({row.layout for row in rows}) == len(rows)
    assert rows[0].name == "dense"


def test_weights_alone_may_not_fit() -> None:
    found = plan(paper(), 2 * parameters(10) - 1, 2048)
    assert not found.own.fits
    assert found.own.reason == "the weights alone do not fit"
    assert (found.own.slots, found.own.largest_context) == (0, 0)
    assert found.own.cache_budget < 0
    assert "no, the weights alone do not fit: CLA2, dense" in shown(found)
    tight = plan(paper(), 2 * parameters(10), 2048)
    assert tight.own.reason == "weights and reserve alone do not fit"


def test_a_batch_that_does_not_fit() -> None:
    memory = 2 * parameters(10) + 3 * 5120 * 2048
    found = plan(paper(), memory, 2048, 8, reserve=0)
    assert (found.own.slots, found.own.reason) == (3, "3 of 8 slots fit")
    assert found.own.largest_context == 3 * 2048 // 8
    rows = {row.name: row for row in found.rows}
    assert rows["one owner"].fits
    alone = plan(paper(), 2 * parameters(10) + 5120 * 2047, 2048, reserve=0)
    assert (alone.own.reason, alone.own.largest_context) == ("not one slot fits", 2047)


def test_a_context_beyond_the_models_positions_is_noted() -> None:
    assert "more than the model's 2,048 positions" in plan(paper(), "16GiB", 4096).notes[0]
    assert not plan(paper(), "16GiB", 2048).notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": True}, "context is True"),
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "fp12"}, "dtype is 'fp12'; expected one of float32"),
        ({"weights_dtype": "q4"}, "weights dtype is 'q4'"),
        ({"reserve": 1.0}, "reserve is 1.0"),
        ({"reserve": -0.1}, "reserve is -0.1"),
        ({"memory": "16G"}, "ambiguous"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan(paper(), **({"memory": "16GiB", "context": 2048} | change))


def test_a_folder_or_a_config_file(tmp_path: Path) -> None:
    config = {
        "model_type": "cla", "num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 12,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 10,
        "max_position_embeddings": 32, "kv_owner": [0, 0, 2, 2],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(tmp_path, "1MiB", 32)
    assert found == plan(str(tmp_path / "config.json"), "1MiB", 32)
    assert found.name == tmp_path.name
    assert found.own.bytes_per_token == 2 * 2 * 4 * 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3000"}))
    with pytest.raises(BadInput, match="model_type is 'gemma3000', which is not supported"):
        plan(tmp_path, "1MiB", 32)
    with pytest.raises(BadInput, match="does not exist"):
        plan(tmp_path / "nothing", "1MiB", 32)


# Views


def test_json_reads_back() -> None:
    data = json.loads(json.dumps(plan(paper(), "16GiB", 2048, 4).to_json()))
    assert data["rows"][0]["own"]
    assert KVLayout.from_json(data["rows"][0]["layout"]) == paper().layout
    assert (data["rows"][0]["groups"], data["batch"]) == (10, 4)


@pytest.mark.parametrize("memory", ["16GiB", "1.8GB", "640GB"])
def test_the_table_fits_80_columns(memory: str) -> None:
    text = shown(plan(paper(), memory, 2048, 8, name="H128-MQA-CLA2"))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\n> CLA2 ") == 1
    assert "faster" not in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plan.{suffix}"
    plot(plan(paper(), "16GiB", 2048, 64, name="H128-MQA-CLA2"), file)
    start = file.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


def test_figures_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"plots are written as \.png, \.svg, \.pdf"):
        plot(plan(paper(), "16GiB", 2048), tmp_path / "plan.txt")
    with pytest.raises(BadInput, match="no layout leaves memory for caches"):
        plot(plan(paper(), "1GiB", 2048), tmp_path / "plan.png")
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingEnvironment, match=r"pip install 'cla-export\[plot\]'"):
        plot(plan(paper(), "16GiB", 2048), tmp_path / "plan.png")
