"""onnxruntime-genai opens a bundle as it is, and generates what PyTorch generates."""

import json
from collections.abc import Iterator

import numpy as np
import onnxruntime_genai as og
import pytest
from models_zoo import MIXED, Zoo, make_config, make_spec, stateless_logits

from cla_export.genai import genai_config
from cla_export.models.cla import ClaDecoder

CLOSE = 1e-4  # float32 through other kernels; measured errors stay under 1e-5
NEW_TOKENS = 10
EOS, FIRST_WORD, VOCAB = 2, 3, 61  # ids 0 to 2 are pad, bos and eos
MODELS = {
    "GroupQueryAttention": {"kv_owner": (0, 0)},
    "GroupQueryAttention, window": MIXED,
    "Attention": {"kv_owner": (0, 0), "head_dim": 10},
    "Attention, window": {"kv_owner": (0, 0), "head_dim": 10, "sliding_window": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def overrides(request: pytest.FixtureRequest) -> dict:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def genai(zoo: Zoo, overrides: dict) -> Iterator[og.Model]:
    bundle = zoo.bundle(**overrides)
    wanted = {"GroupQueryAttention"} if "head_dim" not in overrides else {"Attention"}
    assert {group["attention"] for group in bundle.manifest["groups"]} == wanted
    return og.Model(str(bundle.folder))


@pytest.fixture(scope="module")
def torch_model(zoo: Zoo, overrides: dict) -> ClaDecoder:
    return zoo.model(**overrides)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(FIRST_WORD, VOCAB, length).tolist()


def greedy(model: ClaDecoder, prompt: list[int], total: int) -> list[int]:
    """PyTorch's own choice, up to `total` tokens or the end-of-text token."""
    tokens = list(prompt)
    while len(tokens) < total and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        logits = stateless_logits(model, tokens)[-1]
        best, second = np.sort(logits)[[-1, -2]]
        assert best - second > 1e-3, "choose another prompt: rounding could decide this one"
        tokens.append(int(logits.argmax()))
    return tokens


def generator(genai: og.Model, **options: object) -> og.Generator:
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(**options)
    return og.Generator(genai, parameters)


def until_done(generator: og.Generator) -> None:
    while not generator.is_done():
        generator.generate_next_token()


def without_eos(tokens: list[int]) -> list[int]:
    """genai leaves the end-of-text token out of its sequences."""
    return tokens[:-1] if tokens[-1] == EOS else tokens


@pytest.mark.parametrize("length", [1, 2, 9, 23])
def test_greedy(genai: og.Model, torch_model: ClaDecoder, length: int) -> None:
    """With the options of genai_config.json: greedy, past and present in one buffer."""
    prompt = prompt_of(length)
    made = generator(genai, max_length=length + NEW_TOKENS)
    made.append_tokens(prompt)
    assert np.array(made.get_output("present.0.key")).shape[2] == length + NEW_TOKENS
    until_done(made)
    expected = greedy(torch_model, prompt, length + NEW_TOKENS)
    assert made.get_sequence(0).tolist() == without_eos(expected)


def test_to_the_last_position(genai: og.Model, torch_model: ClaDecoder) -> None:
    prompt = prompt_of(12)
    made = generator(genai)
    made.append_tokens(prompt)
    until_done(made)
    expected = greedy(torch_model, prompt, 64)
    assert made.get_sequence(0).tolist() == without_eos(expected)


def test_a_ragged_batch(genai: og.Model, torch_model: ClaDecoder) -> None:
    """Prompts of different lengths in one generator, padded on the right, as genai pads."""
    prompts = [prompt_of(length) for length in (3, 9, 1, 7)]
    longest = max(map(len, prompts))
    batch = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(batch, prompts, strict=True):
        row[: len(prompt)] = prompt
    made = generator(genai, max_length=longest + NEW_TOKENS, batch_size=len(prompts))
    made.append_tokens(batch)
    assert np.array(made.get_input("attention_mask")).sum(-1).tolist() == [3, 9, 1, 7]
    for index, prompt in enumerate(prompts):
        expected = stateless_logits(torch_model, prompt)[-1]
        assert np.abs(made.get_logits()[index, -1] - expected).max() <= CLOSE
    until_done(made)
    for index, prompt in enumerate(prompts):
        expected = greedy(torch_model, prompt, len(prompt) + NEW_TOKENS)[len(prompt) :]
        got = made.get_sequence(index).tolist()[longest:]
        assert got[: len(expected)] == expected[: len(got)]
        assert len(got) >= len(without_eos(expected))


def test_text_appended_in_pieces_and_rewound(genai: og.Model, torch_model: ClaDecoder) -> None:
    text = prompt_of(17)
    made = generator(genai, max_length=40)
    held = 0
    for piece in (4, 1, 7, 1, 4):
        made.append_tokens(text[held : held + piece])
        held += piece
        expected = stateless_logits(torch_model, text[:held])[-1]
        assert np.abs(made.get_logits()[0, -1] - expected).max() <= CLOSE
    made.rewind_to(6)
    other = [*text[:6], *prompt_of(5)]
    made.append_tokens(other[6:])
    expected = stateless_logits(torch_model, other)[-1]
    assert np.abs(made.get_logits()[0, -1] - expected).max() <= CLOSE


def test_sampling_reads_the_same_logits(genai: og.Model, torch_model: ClaDecoder) -> None:
    prompt = prompt_of(5)
    made = generator(genai, max_length=25, do_sample=True, temperature=1.0, random_seed=7)
    made.append_tokens(prompt)
    while not made.is_done():
        tokens = made.get_sequence(0).tolist()
        expected = stateless_logits(torch_model, tokens)[-1]
        assert np.abs(made.get_logits()[0, -1] - expected).max() <= CLOSE
        made.generate_next_token()


# genai_config.json.


def test_config_of_a_bundle(zoo: Zoo) -> None:
    config = json.loads((zoo.bundle(**MIXED).folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["context_length"], model["vocab_size"]) == (64, 61)
    assert [model[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert decoder["num_hidden_layers"] == 2, "groups: one cache each"
    assert decoder["filename"] == "model.onnx"
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 2)
    assert config["search"]["past_present_share_buffer"] is True
    assert config["search"]["max_length"] == 64


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {}, {"eos_token_id": 5, "pad_token_id": 5}),
        ({"eos_token_id": 5}, {"eos_token_id": 9}, {"eos_token_id": 9, "pad_token_id": 9}),
        ({"eos_token_id": [5, 6]}, {}, {"eos_token_id": [5, 6], "pad_token_id": 5}),
        ({"eos_token_id": 5, "pad_token_id": 0}, {}, {"eos_token_id": 5, "pad_token_id": 0}),
        ({"bos_token_id": 1}, {}, {"bos_token_id": 1}),
        ({}, {}, {}),
    ],
)
def test_special_tokens(config: dict, generation: dict, expected: dict) -> None:
    plain = {k: v for k, v in make_config().items() if not k.endswith("_token_id")}
    model = genai_config(make_spec(), {**plain, **config}, generation)["model"]
    assert isinstance(model, dict)
    assert {k: v for k, v in model.items() if k.endswith("_token_id")} == expected
