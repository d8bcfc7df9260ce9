"""KV layout arithmetic, owner maps, paper names and config importers, by example."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cla_export.errors import LayoutError
from cla_export.layout import (
    KVLayout,
    bits,
    dense_back,
    dense_front,
    identity,
    keep_ends,
    layout_from_config,
    one_owner,
    paper_layout,
    parse_paper_name,
    uniform,
)

ROWS = list(csv.DictReader((Path(__file__).parent / "paper_rows.csv").open()))
LLAMA = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
S, F = "sliding_attention", "full_attention"
MIDDLE: Any = "middle"
GEMMA_4_E2B: dict[str, Any] = {
    "model_type": "gemma4",
    "vision_config": {"num_hidden_layers": 16},
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 20,
        "sliding_window": 512,
        "layer_types": [S, S, S, S, F] * 7,
    },
}
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
HUNYUAN_LARGE = {
    "model_type": "hunyuan",
    "hidden_size": 6400,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "use_cla": True,
    "cla_share_factor": 2,
}
HYMBA = {
    "hidden_size": 1600,
    "num_hidden_layers": 32,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "sliding_window": 1024,
    "global_attn_idx": [0, 15, 31],
    "kv_reuse_every_i_layer": -1,
    "kv_reuse_group": [[i, i + 1] for i in range(1, 14, 2)]
    + [[16, 17, 18]]
    + [[i, i + 1] for i in range(19, 30, 2)],
    "kv_weight_reuse": False,
}


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['source']} {r['name']}" for r in ROWS])
def test_paper_row(row: dict[str, str]) -> None:
    layout = paper_layout(row["name"], int(row["n_layers"]), int(row["q_heads"]))
    assert layout.num_groups == int(row["kv_layers"])
    assert layout.bytes_per_token("float16") == int(row["kv_bytes_per_token"])
    assert set(layout.head_dim) == {int(row["d_head"])}
    assert set(layout.kv_heads) == {int(row["kv_heads"])}


def pairs(start: int, stop: int) -> tuple[int, ...]:
    return tuple(start + (i - start) // 2 * 2 for i in range(start, stop))


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        (uniform(20, 2), pairs(0, 20)),
        (uniform(10, 3, "first"), (0, 1, 1, 1, 4, 4, 4, 7, 7, 7)),
        (uniform(20, 3, "first"), (0, 0, *(i for i in range(2, 20, 3) for _ in range(3)))),
        (uniform(20, 3, "last"), (*(i for i in range(0, 18, 3) for _ in range(3)), 18, 18)),
        (uniform(20, 4), tuple(i // 4 * 4 for i in range(20))),
        (uniform(5, 1), (0, 1, 2, 3, 4)),
        (uniform(20, 2, "first"), pairs(0, 20)),
        (identity(3), (0, 1, 2)),
        (one_owner(3), (0, 0, 0)),
        (keep_ends(20), (0, *pairs(1, 19), 19)),
        (keep_ends(7), (0, 1, 2, 2, 4, 4, 6)),
        (keep_ends(3), (0, 1, 2)),
        (dense_front(20), (*range(10), *[9] * 9, 19)),
        (dense_front(7), (0, 1, 2, 2, 2, 2, 6)),
        (dense_front(1), (0,)),
        (dense_back(20), (0, 1, *[1] * 9, *range(11, 20))),
        (dense_back(7), (0, 1, 1, 1, 4, 5, 6)),
        (dense_back(1), (0,)),
    ],
)
def test_owner_map(owners: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert owners == expected


def test_uniform_never_guesses_the_remainder() -> None:
    with pytest.raises(
        LayoutError, match=r"3 does not divide 10 layers.*'first' \(0,1,1,1,4.*'last'"
    ):
        uniform(10, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H128-MQA-CLA2-KeepEnds", (128, 1, "KeepEnds")),
        ("H90-MQA-CLA2", (90, 1, "CLA2")),
        ("H128-GQA4", (128, 4, "identity")),
        ("H128-MHA", (128, "MHA", "identity")),
    ],
)
def test_parse_paper_name(name: str, expected: tuple[int, int | str, str]) -> None:
    assert parse_paper_name(name) == expected


@pytest.mark.parametrize(
    "name", ["H128", "H0-MQA", "H128-GQA", "H128-MQA-CLA", "H128-MQA-CLA3-KeepEnds", "h128-MQA"]
)
def test_not_a_paper_name(name: str) -> None:
    with pytest.raises(LayoutError, match="such as H128-MQA-CLA2"):
        parse_paper_name(name)


def test_paper_layout_remainder() -> None:
    first = paper_layout("H128-MQA-CLA3", 20, 16)
    last = paper_layout("H128-MQA-CLA3", 20, 16, remainder="last")
    assert (first.kv_owner, last.kv_owner) == (uniform(20, 3, "first"), uniform(20, 3, "last"))
    with pytest.raises(LayoutError, match="15 query heads cannot share 4 kv heads"):
        paper_layout("H128-GQA4-CLA2", 20, 15)


def test_groups_of_interleaved_layers() -> None:
    layout = KVLayout.create([0, 1, 0, 1, 4, 1], 2, 8, [None, 16, None, 16, None, 16])
    assert [g.layers for g in layout.groups] == [(0, 2), (1, 3, 5), (4,)]
    assert layout.groups[1].sharers == (3, 5)
    assert (layout.groups[1].index, layout.groups[1].owner, layout.groups[1].window) == (1, 1, 16)
    assert [layout.group_of(i) for i in range(6)] == [0, 1, 0, 1, 2, 1]
    assert [layout.is_owner(i) for i in range(6)] == [True, True, False, False, True, False]
    assert layout.sharing_factor == 2.0
    with pytest.raises(LayoutError, match=r"layer -1: there is none; layers are 0\.\.5"):
        layout.group_of(-1)
    with pytest.raises(LayoutError, match="layer 6: there is none"):
        layout.is_owner(6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([], 1, 8), "kv_owner has 0 entries; expected 1"),
        (([0, 2, 2], 1, 8), r"layer 1: kv_owner is 2, which is later .*\(got 0,2,2\).*in 0\.\.1"),
        (([0, 0, 1], 1, 8), r"layer 2: kv_owner is 1, but layer 1 .* set kv_owner\[2\] to 0"),
        (([0, -1], 1, 8), "layer 1: kv_owner is -1; expected a layer number"),
        (([0, 0], [2, 1], 8), r"layer 1: .*kv_heads differ.* has 1, .* has 2.*set kv_owner\[1\]"),
        (([0, 0], 1, [8, 16]), "layer 1: kv_owner is 0, but their head_dim differ"),
        (([0, 0], 1, 8, [None, 4]), "layer 1: kv_owner is 0, but their window differ"),
        (([0, 1], [1], 8), "kv_heads has 1 entries; expected 2, one per layer"),
        (([0, 1], 0, 8), "layer 0: kv_heads is 0; expected a positive whole number"),
        (([0, 1], 1, [8, 8.0]), "layer 1: head_dim is 8.0; expected a positive"),
        (([0, True], 1, 8), "layer 1: kv_owner is True; expected a layer number"),
        (([0, "1"], 1, 8), "layer 1: kv_owner is '1'"),
        (([0, 1], None, 8), "layer 0: kv_heads is None"),
        (([0, 1], 1, 8, 0), "layer 0: window is 0"),
    ],
)
def test_illegal_layout(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        KVLayout.create(*args)


def test_lists_are_refused_by_the_constructor() -> None:
    with pytest.raises(LayoutError, match=r"kv_owner is a list; use KVLayout\.create"):
        KVLayout([0], (1,), (8,), (None,))  # type: ignore[arg-type]


def test_bytes_and_what_fits() -> None:
    layout = paper_layout("H128-MQA-CLA2", 20, 16)
    assert layout.bytes_per_token("bf16") == 5120
    assert layout.bytes_per_token("float32") == 10240
    assert layout.bytes_per_token("float8_e4m3fn") == layout.bytes_per_token("int8") == 2560
    assert layout.bytes_per_slot(2048, "bf16") == 2048 * 5120
    assert layout.slots_that_fit(10 * 2048 * 5120 - 1, 2048, "bf16") == 9
    assert layout.context_that_fits(2 * 5120 * 100, 2, "bf16") == 100
    assert layout.slots_that_fit(0, 2048, "bf16") == 0
    assert (
        KVLayout.create([0], 1, 5).bytes_per_token("int4") == 2 * 3
    )  # 2.5 bytes a row, rounded up


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: bits("float12"), "cache dtype 'float12' is not known; use one of float32, fp32"),
        (
            lambda x: x.bytes_per_slot(0, "fp16"),
            "capacity is 0; expected a whole number, at least 1",
        ),
        (lambda x: x.slots_that_fit(-1, 8, "fp16"), "memory_bytes is -1"),
        (lambda x: x.context_that_fits(8, 0, "fp16"), "slots is 0"),
        (lambda x: uniform(0, 2), "layers is 0"),
        (lambda x: uniform(4, 0), "sharing factor is 0"),
        (lambda x: uniform(4, 2, MIDDLE), "remainder is 'middle'; expected 'first' or 'last'"),
        (lambda x: KVLayout.from_json({"kv_owner": [0]}), "expected kv_owner, kv_heads, head_dim"),
        (lambda x: KVLayout.from_json({**x.to_json(), "window": None}), "each a list with one"),
        (lambda x: KVLayout.from_json({**x.to_json(), "extra": []}), "no other key"),
    ],
)
def test_bad_argument(call: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        call(KVLayout.create([0], 1, 8))


@pytest.mark.parametrize(
    ("owners", "text"),
    [
        (uniform(20, 2), "20 layers in 10 groups, CLA2"),
        (uniform(20, 3, "first"), "20 layers in 7 groups, CLA3 (remainder first)"),
        (uniform(20, 3, "last"), "20 layers in 7 groups, CLA3 (remainder last)"),
        (uniform(7, 5, "last"), "7 layers in 2 groups, CLA5 (remainder last)"),
        (identity(20), "20 layers in 20 groups, no sharing"),
        (one_owner(4), "4 layers in 1 group, one owner"),
        (keep_ends(20), "20 layers in 11 groups, CLA2-KeepEnds"),
        (dense_front(20), "20 layers in 11 groups, CLA2-DenseFront"),
        (dense_back(20), "20 layers in 11 groups, CLA2-DenseBack"),
        ([0, 1, 0, 1, 4, 1], "6 layers in 3 groups, 3 sharers of 2 owners (0,1)"),
    ],
)
def test_describe(owners: tuple[int, ...], text: str) -> None:
    assert KVLayout.create(owners, 1, 8).describe() == text


# Configs.


def test_gemma_4_e2b() -> None:
    layout = layout_from_config(GEMMA_4_E2B)
    assert layout.kv_owner == (*range(15), *[13, 13, 13, 13, 14] * 4)
    assert layout.num_groups == 15
    assert layout.head_dim == (256, 256, 256, 256, 512) * 7
    assert layout.window == (512, 512, 512, 512, None) * 7
    assert set(layout.kv_heads) == {1}
    assert layout.bytes_per_token("bf16") == 2 * 2 * (12 * 256 + 3 * 512)
    assert layout.describe() == "35 layers in 15 groups, 20 sharers of 2 owners (13,14)"


def test_gemma_4_head_shape_by_layer() -> None:
    text = dict(GEMMA_4_E2B["text_config"])
    del text["global_head_dim"]
    text["per_layer_config"] = {str(i): {"head_dim": 512} for i in range(4, 35, 5)}
    assert layout_from_config(text) == layout_from_config(GEMMA_4_E2B)
    text |= {"num_kv_shared_layers": 0, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
    assert set(layout_from_config(text).kv_heads) == {4}
    text["attention_k_eq_v"] = True
    assert layout_from_config(text).kv_heads == (4, 4, 4, 4, 2) * 7


def test_gemma_3n() -> None:
    layout = layout_from_config(GEMMA_3N)
    assert layout.kv_owner == (*range(20), *[18, 18, 18, 18, 19] * 3)
    assert set(layout.head_dim) == {256}
    assert layout.window[18:20] == (512, None)
    assert layout_from_config(GEMMA_3N | {"head_dim": 64}) == layout  # the inner config wins


def test_hunyuan_large() -> None:
    layout = layout_from_config(HUNYUAN_LARGE)
    assert layout.describe() == "64 layers in 32 groups, CLA2"
    assert layout.bytes_per_token("bfloat16") == 81920
    assert layout.dense_twin().bytes_per_token("bfloat16") == 163840
    assert layout_from_config(HUNYUAN_LARGE | {"use_cla": False}).kv_owner == identity(64)
    odd = HUNYUAN_LARGE | {"num_hidden_layers": 5, "cla_share_factor": 3}
    assert layout_from_config(odd).kv_owner == (0, 0, 0, 3, 3)


def test_hunyuan_factor_without_use_cla_means_nothing() -> None:
    assert layout_from_config(LLAMA | {"cla_share_factor": 2}).kv_owner == identity(4)


def test_hymba() -> None:
    layout = layout_from_config(HYMBA)
    assert layout.kv_owner[:4] == (0, 1, 1, 3)
    assert layout.kv_owner[14:20] == (13, 15, 16, 16, 16, 19)
    assert [i for i, w in enumerate(layout.window) if w is None] == [0, 15, 31]
    assert set(layout.head_dim) == {64}
    assert layout.num_groups == 17


def test_dolomite() -> None:
    config = {
        "model_type": "gpt_crosslayer",
        "n_layer": 32,
        "n_head": 12,
        "n_embd": 3072,
        "n_inner": 8192,
        "attention_head_type": "mqa",
        "num_key_value_heads": 1,
        "sharing_pattern": list(uniform(32, 2)),
    }
    layout = layout_from_config(config)
    assert layout.describe() == "32 layers in 16 groups, CLA2"
    assert layout.bytes_per_token("bf16") == 16384
    del config["num_key_value_heads"]
    assert layout_from_config(config) == layout
    mha = layout_from_config(config | {"attention_head_type": "mha", "sharing_pattern": None})
    assert (mha.kv_heads[0], mha.kv_owner) == (12, identity(32))


def test_lckv_text() -> None:
    layout = layout_from_config(LLAMA | {"layer_types": "0_0_2s_2s", "sliding_window": 128})
    assert (layout.kv_owner, layout.window) == ((0, 0, 2, 2), (None, None, 128, 128))


@pytest.mark.parametrize("key", ["kv_owner", "sharing_pattern", "kv_source_layers"])
def test_owner_list(key: str) -> None:
    assert layout_from_config(LLAMA | {key: [0, 1, 0, 1]}).kv_owner == (0, 1, 0, 1)
    assert layout_from_config(LLAMA | {key: None}).kv_owner == identity(4)
    with pytest.raises(LayoutError, match=f"config {key}: layer 1: kv_owner is 3, which is later"):
        layout_from_config(LLAMA | {key: [0, 3, 2, 3]})


def test_spellings_that_agree_are_fine() -> None:
    config = LLAMA | {"kv_owner": [0, 0, 2, 2], "use_cla": True, "cla_share_factor": 2}
    assert layout_from_config(config).kv_owner == (0, 0, 2, 2)


@pytest.mark.parametrize(
    ("extra", "kv_heads", "head_dim", "window"),
    [
        ({}, 4, 16, None),
        ({"num_key_value_heads": 2, "head_dim": 32}, 2, 32, None),
        ({"num_key_value_heads": None, "head_dim": None, "sliding_window": None}, 4, 16, None),
        ({"sliding_window": 128}, 4, 16, 128),
        ({"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 2}, 4, 16, None),
        ({"attention_head_dim": 8, "head_dim": 8}, 4, 8, None),
    ],
)
def test_llama_keys(
    extra: dict[str, Any], kv_heads: int, head_dim: int, window: int | None
) -> None:
    expected = KVLayout.create(identity(4), kv_heads, head_dim, window)
    assert layout_from_config(LLAMA | extra) == expected


def test_layer_types() -> None:
    config = LLAMA | {"sliding_window": 64, "layer_types": [S, F, S, F]}
    assert layout_from_config(config).window == (64, None, 64, None)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_hidden_layers": None}, "config has no num_hidden_layers or n_layer.*; add it"),
        ({"num_hidden_layers": "4"}, "config num_hidden_layers is '4'; expected a whole number"),
        ({"num_hidden_layers": 4.0}, r"config num_hidden_layers is 4\.0"),
        ({"num_attention_heads": True}, "config num_attention_heads is True"),
        ({"num_key_value_heads": -1}, "config num_key_value_heads is -1; .* at least 1"),
        ({"num_key_value_heads": 3}, "layer 0: 4 query heads cannot share 3 kv heads"),
        (
            {"hidden_size": 65},
            "hidden_size 65 is not a multiple of 4 attention heads; add head_dim",
        ),
        ({"n_layer": 5}, "num_hidden_layers 4 and n_layer 5, which mean the same; remove"),
        ({"sliding_window": 0}, "config sliding_window is 0"),
        ({"use_sliding_window": "no"}, "config use_sliding_window is 'no'; expected true or false"),
        ({"use_cla": 1, "cla_share_factor": 2}, "config use_cla is 1; expected true or false"),
        ({"use_cla": True}, "config has no cla_share_factor; add it"),
        ({"use_cla": True, "cla_share_factor": 2.0}, r"config cla_share_factor is 2\.0"),
        ({"kv_owner": "0,0"}, "config kv_owner is '0,0'; expected a list of 4, one for each layer"),
        ({"kv_owner": [0, 0]}, "config kv_owner has 2 entries; expected a list of 4"),
        ({"kv_owner": [0, 0, 2, "2"]}, r"config kv_owner\[3\] is '2'"),
        (
            {"kv_owner": [0, 0, 0, 0], "use_cla": True, "cla_share_factor": 2},
            "config kv_owner and use_cla disagree at layer 2: .* 0 by kv_owner, layer 2 by use_cla",
        ),
        (
            {"kv_owner": [0, 0, 2, 2], "num_kv_shared_layers": 0},
            "kv_owner and num_kv_shared_layers",
        ),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2 but there is no layer_types"),
        ({"num_kv_shared_layers": 4}, "4 of 4 layers: none writes a cache.* another model"),
        (
            {"num_kv_shared_layers": 2, "layer_types": [F, F, S, F], "sliding_window": 8},
            "layer 2: .* no 'sliding_attention' layer comes before layer 2; correct layer_types",
        ),
        ({"layer_types": [F, F, F]}, "config layer_types has 3 entries; expected a list of 4"),
        ({"layer_types": [F, "linear_attention", F, F]}, "layer 1: .* has 'linear_attention'"),
        ({"layer_types": [F, {}, F, F]}, "layer 1: config layer_types has {}"),
        ({"layer_types": [F, S, F, F]}, "layer 1: .* makes it slide, but sliding_window is None"),
        (
            {"layer_types": [F, S, F, F], "sliding_window": 8, "use_sliding_window": False},
            "sliding_window is 8 and use_sliding_window is false",
        ),
        ({"layer_types": "0_3_2_3"}, "layer 1: config layer_types makes it read the later layer 3"),
        ({"layer_types": "0_0_2"}, "expected 4 layer numbers joined by _"),
        ({"layer_types": "0_0_2_x"}, "expected 4 layer numbers joined by _"),
        ({"layer_types": "0_0_2_2s", "sliding_window": 8}, "layer 3: .* their window differ"),
        ({"layer_types": "0_0_2s_2s"}, "layer 2: .* makes it slide"),
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, "layer 2: config kv_reuse_group .* in two groups"),
        ({"kv_reuse_group": [[1, 9]]}, "layer 9: .* is not one of the 4 layers"),
        ({"kv_reuse_group": [1, 2]}, "config kv_reuse_group holds 1; expected lists of layers"),
        ({"kv_reuse_group": [[2, 1]]}, "config kv_reuse_group: layer 1: kv_owner is 2.* later"),
        ({"kv_reuse_every_i_layer": 2}, "kv_reuse_every_i_layer is 2.* add kv_owner"),
        ({"sliding_window": 8, "sliding_window_pattern": 6}, "some layers only .*add layer_types"),
        ({"sliding_window": 8, "model_type": "gemma2"}, "some layers only .*add layer_types"),
        (
            {"attention_head_type": "mqa", "num_key_value_heads": 2},
            "is mqa but num_key_value_heads",
        ),
        ({"attention_head_type": "gqa"}, "config has no num_key_value_heads; add it"),
        ({"attention_head_type": "xqa"}, "attention_head_type is 'xqa'; expected mha, mqa or gqa"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is 512: multi-head latent attention"),
        ({"v_head_dim": 128}, "v_head_dim is 128 and head_dim 16"),
        (
            {"per_layer_config": {"9": {"head_dim": 8}}},
            r"per_layer_config\['9'\] .* layer in 0\.\.3",
        ),
        ({"per_layer_config": {"1": {"head_dim": "8"}}}, "config head_dim is '8'"),
    ],
)
def test_config_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout_from_config(LLAMA | extra)


def test_import_needs_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import cla_export.layout; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
    assert done.split() == ["cla_export"]
