"""Model folders: what is read back, and what each kind of wrong folder is told."""

import json
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models_zoo import make_checkpoint, make_config, random_model, rows
from safetensors.torch import load_file, save_file

from cla_export.errors import BadInput
from cla_export.models import cla
from cla_export.models.checkpoint import load_model, open_checkpoint, save_checkpoint
from cla_export.models.safetensors_index import read_header

WEIGHTS = "model.safetensors"
OWNERS = (0, 0, 2, 2)
Edit = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", kv_owner=OWNERS)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, *parts: str) -> None:
    """open_checkpoint says no, names the folder or file, and says each of `parts`."""
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert caught.value.exit_code == 2


# What is written is read back.


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    config = make_config(kv_owner=OWNERS, separate_kv_norm=True, tie_word_embeddings=False)
    model = random_model(cla.read_spec(config))
    save_checkpoint(model, tmp_path / "m", config, dtype=dtype, generation_config={"top_k": 5})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == config
    assert checkpoint.spec == model.spec
    assert checkpoint.dtype == name
    assert set(checkpoint.tensors) == set(model.spec.weights())
    loaded = load_model(checkpoint)
    for key, parameter in model.named_parameters():
        got = loaded.get_parameter(key)
        assert got.dtype == torch.float32
        assert torch.equal(got, parameter.to(dtype).float())
    assert not loaded.training
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"top_k": 5}
    if dtype == torch.float32:
        with torch.inference_mode():
            assert torch.equal(loaded(*rows(2, 9)), model(*rows(2, 9)))


def test_load_in_another_dtype(folder: Path) -> None:
    model = load_model(open_checkpoint(folder), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rope_cos.dtype == torch.float32, "angles stay exact"
    with torch.inference_mode():
        assert model(*rows(1, 5)).dtype == torch.bfloat16


def test_a_tied_head_is_stored_once_and_stays_tied(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    model = load_model(open_checkpoint(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = load_model(open_checkpoint(folder), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_stored_copy_of_a_tied_head_is_fine(folder: Path) -> None:
    def copy_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, copy_head)
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


def test_old_rotary_buffers_are_passed_over(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, add)
    assert len(open_checkpoint(folder).tensors) == len(open_checkpoint(folder).spec.weights())


def test_tensors_that_are_not_aligned(folder: Path) -> None:
    """A header of any length is legal; the data after it then starts at any byte."""
    path = folder / WEIGHTS
    before = load_model(open_checkpoint(folder))
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].rstrip()
    header += b" " * ((1 - len(header)) % 4)
    assert (8 + len(header)) % 4
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    after = load_model(open_checkpoint(folder))
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name))


def shard(folder: Path, parts: int = 3) -> list[str]:
    """Split model.safetensors as large checkpoints are."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = [], {}
    for index in range(parts):
        name = f"model-{index + 1:05}-of-{parts:05}.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[index::parts]}
        save_file(mine, folder / name)
        weight_map |= dict.fromkeys(mine, name)
        names.append(name)
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
    return names


def test_shards(folder: Path) -> None:
    before = load_model(open_checkpoint(folder))
    names = shard(folder)
    checkpoint = open_checkpoint(folder)
    assert {entry.path.name for entry in checkpoint.tensors.values()} == set(names)
    after = load_model(checkpoint)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name))


# Wrong folders.


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "gone", str(tmp_path / "gone"), "does not exist", "expected a model folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", str(tmp_path / "file"), "is a file", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", str(tmp_path / "empty"), "has no config.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON", "line 1"]),
        ("", ["not valid JSON"]),
        ("[1, 2]", ["expected a JSON object, got list"]),
        ("null", ["expected a JSON object, got NoneType"]),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, text: str, parts: list[str]) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, str(folder / "config.json"), *parts)


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, str(folder / "config.json"), "not valid JSON")


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("clla", ["'clla'", "did you mean 'cla'", "supported: cla"]),
        (
            "clla",
            [
                "Any other model has two ways in: --module package.module:factory names a function "
                "of yours that makes its PyTorch module, and `cla-export rewrite` takes an ONNX "
                "graph that you traced"
            ],
        ),
        ("gpt_knee_ox", ["'gpt_knee_ox'", "supported: cla", "did you mean 'gpt_neox'"]),
        (None, ["model_type is None"]),
        (["cla"], ["model_type is ['cla']"]),
    ],
)
def test_an_unknown_model_type(folder: Path, model_type: object, parts: list[str]) -> None:
    edit_config(folder, model_type=model_type)
    refused(folder, "config.json", *parts)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, str(folder), "no model.safetensors", "safetensors format")


def test_a_file_cut_anywhere(folder: Path) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for length in (0, 4, 8, 9, header_end - 1, header_end, header_end + 1, len(data) - 1):
        path.write_bytes(data[:length])
        refused(folder, str(path), "truncated", "download or save it again")


def with_header(path: Path, header: object) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4096))


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (b"\x80garbage\xff", ["header is not JSON"]),
        (b"{'a': 1}", ["header is not JSON"]),
        ([], ["header", "expected a JSON object"]),
        ({"a": 7}, ["tensor a", "malformed"]),
        ({"a": {}}, ["tensor a", "malformed"]),
        ({"a": {**ENTRY, "data_offsets": [0]}}, ["tensor a", "malformed"]),
        ({"a": {**ENTRY, "data_offsets": ["0", "24"]}}, ["tensor a", "malformed"]),
        ({"a": {**ENTRY, "shape": "2x3"}}, ["tensor a", "malformed"]),
        ({"a": {**ENTRY, "data_offsets": [-8, 16]}}, ["tensor a", "malformed"]),
        ({"a": {**ENTRY, "data_offsets": [0, 20]}}, ["tensor a", "20 bytes", "24"]),
        ({"a": {**ENTRY, "data_offsets": [0, 28]}}, ["tensor a", "28 bytes", "24"]),
    ],
)
def test_a_header_that_is_garbage(folder: Path, header: object, parts: list[str]) -> None:
    with_header(folder / WEIGHTS, header)
    refused(folder, str(folder / WEIGHTS), *parts)


def test_not_a_safetensors_file_at_all(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(range(256)) * 8)
    refused(folder, str(folder / WEIGHTS), "not a safetensors file")


def test_header_of_a_good_file(folder: Path) -> None:
    entries = read_header(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    assert set(entries) == set(tensors)
    data = (folder / WEIGHTS).read_bytes()
    for name, entry in entries.items():
        assert entry.shape == tuple(tensors[name].shape)
        raw = data[entry.offset : entry.offset + entry.nbytes]
        assert np.array_equal(
            np.frombuffer(raw, np.float32).reshape(entry.shape), tensors[name].numpy()
        )


def test_a_wrong_shape(folder: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    edit_weights(folder, transpose)
    refused(
        folder,
        str(folder),
        "model.layers.1.mlp.up_proj.weight has shape [24, 20]",
        "config.json says [20, 24]",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_wrong_dtype(folder: Path, dtype: torch.dtype) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    edit_weights(folder, convert)
    name = {torch.float64: "F64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    refused(folder, f"weight model.norm.weight is {name}", "expected one of F32, F16, BF16")


KV_CASES = {
    "an owner without k_proj": (
        {"kv_owner": [0, 1, 2, 2]},
        "weight model.layers.1.self_attn.k_proj.weight is missing",
        "layer 1 is an owner",
    ),
    "a sharer with k_proj": (
        {"kv_owner": [0, 0, 0, 0]},
        "unexpected weight model.layers.2.self_attn.k_proj.weight",
        "layer 2 is a sharer of layer 0",
    ),
    "no kv_layernorm": (
        {"separate_kv_norm": True},
        "weight model.layers.0.kv_layernorm.weight is missing",
        "separate_kv_norm True",
    ),
}


@pytest.mark.parametrize("case", KV_CASES)
def test_weights_against_the_layout(folder: Path, case: str) -> None:
    changes, *parts = KV_CASES[case]
    edit_config(folder, **changes)
    refused(folder, str(folder), *parts, "correct kv_owner or those options")


def test_weights_of_layers_that_the_config_lacks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2, kv_owner=[0, 0])
    refused(folder, "unexpected weight model.layers.2.", "num_hidden_layers 2")


def test_a_missing_option(folder: Path) -> None:
    edit_config(folder, attention_bias=True)
    refused(folder, "q_proj.bias is missing", "lacks an option")


def test_untied_in_the_config_but_no_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, "weight lm_head.weight is missing", "set it to true if the head is tied")


def test_tied_in_the_config_but_another_head(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_weights(folder, add)
    refused(
        folder,
        f"{folder}: tied weight lm_head.weight differs from model.embed_tokens.weight; config.json "
        "says tie_word_embeddings true: set it to false",
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    shard(folder)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(text)
    refused(folder, str(index), "not a safetensors index")


def refused_as(folder: Path, message: str) -> None:
    """open_checkpoint says no, in these words."""
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == message


def test_a_missing_shard(folder: Path) -> None:
    first, second, _ = shard(folder)
    tensors = {name: sorted(load_file(folder / name)) for name in (first, second)}
    (folder / second).unlink()
    index, total = folder / f"{WEIGHTS}.index.json", len(open_names(folder))
    lost = tensors[second]
    assert len(lost) > 8
    refused_as(
        folder,
        f"{index}: names {second}, which is not in the folder; {len(lost)} of {total} tensors are "
        f"lost with it: {', '.join(lost[:8])} and {len(lost) - 8} more. Download it again",
    )
    (folder / first).unlink()
    lost = sorted(tensors[first] + tensors[second])
    refused_as(
        folder,
        f"{index}: names {first}, {second}, which are not in the folder; {len(lost)} of {total} "
        f"tensors are lost with them: {', '.join(lost[:8])} and {len(lost) - 8} more. Download "
        "them again",
    )


def open_names(folder: Path) -> dict[str, str]:
    """Tensor -> shard, as the index says."""
    return dict(json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"])


@pytest.mark.parametrize("kind", ["parent", "deep", "absolute", "windows"])
def test_a_shard_outside_of_the_folder(folder: Path, tmp_path: Path, kind: str) -> None:
    """It is there and right, and still not opened."""
    first = shard(folder)[0]
    (folder / first).rename(tmp_path / "x.safetensors")
    name = {
        "parent": "../x.safetensors",
        "deep": "a/../../x.safetensors",
        "absolute": str(tmp_path / "x.safetensors"),
        "windows": "..\\x.safetensors",
    }[kind]
    (folder / "a").mkdir()
    index = folder / f"{WEIGHTS}.index.json"
    weight_map = {k: name if v == first else v for k, v in open_names(folder).items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused_as(
        folder,
        f"{index}: names {name!r}, outside of the model folder; such files are not opened: a shard "
        "lies beside its index",
    )


def test_shards_may_be_links(folder: Path, tmp_path: Path) -> None:
    """A download cache keeps files elsewhere, and links them into the folder."""
    first = shard(folder)[0]
    (folder / first).rename(tmp_path / "blob")
    (folder / first).symlink_to(tmp_path / "blob")
    assert len(open_checkpoint(folder).tensors) == len(open_names(folder))


# Dtypes that differ, tensors too many or too few: all of it is said at once.


def test_norms_of_another_dtype(folder: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if "norm" in name else tensor.bfloat16()

    before = load_file(folder / WEIGHTS)
    edit_weights(folder, mix)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "bfloat16", "most bytes are"
    assert checkpoint.notes == (
        "weights are stored as BF16 (25 tensors) and F32 (9 tensors); each is converted from its "
        "own",
    )
    model = load_model(checkpoint)
    for name, tensor in before.items():
        exact = tensor if "norm" in name else tensor.bfloat16().float()
        assert torch.equal(model.get_parameter(name), exact), name


def test_all_that_is_wrong_is_listed(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.layers.0.self_attn.v_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(25)
        down = tensors["model.layers.1.mlp.down_proj.weight"]
        tensors["model.layers.1.mlp.down_proj.weight"] = down.to(torch.int8)
        gate = tensors["model.layers.1.mlp.gate_proj.weight"]
        tensors["model.layers.1.mlp.gate_proj.weight"] = gate.to(torch.float8_e4m3fn)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.0.attn.masked_bias"] = torch.ones(1)

    edit_weights(folder, edit)
    other = "config.json describes another model than these weights (or lacks an option)"
    by_layout = (
        "by config.json's KV layout layer {} (separate_kv_norm False, qk_norm False): "
        "correct kv_owner or those options"
    )
    refused_as(
        folder,
        "\n".join(
            [
                f"{folder}: 6 of its tensors are not what config.json describes",
                "  weight model.layers.0.self_attn.v_proj.weight is missing",
                f"    {by_layout.format('0 is an owner')}",
                "  weight model.layers.0.mlp.up_proj.weight is missing",
                f"    {other}",
                "  weight model.norm.weight has shape [25], config.json says [24]",
                "    one of the two belongs to another model",
                "  weight model.layers.1.mlp.gate_proj.weight is F8_E4M3",
                "  weight model.layers.1.mlp.down_proj.weight is I8",
                "    expected one of F32, F16, BF16; weights that are quantised already are not "
                "read: take the checkpoint that they were made from",
                "  unexpected weight model.layers.1.self_attn.k_proj.weight",
                f"    {by_layout.format('1 is a sharer of layer 0')}",
                "  ignored, since no weights of this model: model.layers.0.attn.masked_bias, "
                "model.layers.0.self_attn.rotary_emb.inv_freq",
            ]
        ),
    )


def test_what_is_ignored_is_said(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, add)
    assert open_checkpoint(folder).notes == (
        "ignored, since no weights of this model: model.layers.0.self_attn.rotary_emb.inv_freq",
    )


# Pickled weights are not opened; the command that the message gives converts them.


class Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_pickled_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]
    for index, name in enumerate(names):
        mine = {key: expected[key] for key in sorted(expected)[index::2]}
        if index == 0:  # shares memory, as a tied head does
            mine["lm_head.weight"] = expected["model.embed_tokens.weight"]
            mine["model.embed_tokens.weight"] = expected["model.embed_tokens.weight"]
        torch.save(mine, folder / name)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    first, command, last = str(caught.value).splitlines()
    assert first == (
        f"{folder}: its weights are pickled ({', '.join(names)}), which are not opened, since "
        "unpickling can run code. Convert them once, tensors alone:"
    )
    assert last == (
        "or, where transformers knows the model, open it there and write it with save_pretrained"
    )
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    model = load_model(open_checkpoint(folder))
    for name, tensor in expected.items():
        assert torch.equal(model.get_parameter(name), tensor)
    (folder / WEIGHTS).unlink()
    monkeypatch.chdir(folder)
    torch.save({"model.norm.weight": Trap()}, folder / names[0])
    refused(folder, "unpickling can run code")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode and "Weights only load failed" in done.stderr
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["consolidated.00.pth"], ["names in it are Meta's, so pass --module", "python -c"]),
        (
            ["consolidated.00.pth", "consolidated.01.pth"],
            ["each of these holds a part of every tensor", "published in safetensors format too"],
        ),
        (["pytorch_model.bin"], ["pickled (pytorch_model.bin)", "python -c"]),
        (["model.pt"], ["pickled (model.pt)", "python -c"]),
        (["checkpoint.pth", "optimizer.pt"], ["pickled (optimizer.pt)", "python -c"]),
    ],
)
def test_other_pickles(folder: Path, names: list[str], parts: list[str]) -> None:
    (folder / WEIGHTS).unlink()
    for name in names:
        torch.save({"trap": Trap()}, folder / name)
    refused(folder, f"{folder}: its weights are pickled", *parts)


def test_an_incomplete_shard(folder: Path) -> None:
    name = shard(folder)[2]
    (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    refused(folder, str(folder / name), "truncated")
