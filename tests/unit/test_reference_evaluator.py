"""The portable graph under onnx's own reference evaluator: what it means by the standard alone."""

import numpy as np
import onnx
import pytest
from models_zoo import (
    BASE,
    MIXED,
    OWN_MODULE,
    OWN_STATED,
    Zoo,
    save_own,
    stateless_kv,
    stateless_logits,
    tokens_of,
)
from onnx.reference import ReferenceEvaluator

from cla_export.bundle import Bundle
from cla_export.exporter import export
from cla_export.models.checkpoint import load_model, open_checkpoint
from cla_export.models.decoder import Decoder

CLOSE = 1e-4  # float32 through NumPy; measured errors stay under 1e-5
CAPACITY, VOCAB = 20, BASE["vocab_size"]
GEMMA = {  # the last two layers read the last own of their kind
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")
    ],
    "sliding_window": 5,
}
MODELS = {
    "mixed": MIXED,
    "head dim 10": {"kv_owner": (0, 0), "head_dim": 10},
    "as Gemma": GEMMA,
    "a module of one's own": None,
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=MODELS)
def bundle(
    request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    overrides = MODELS[request.param]
    if overrides is not None:
        return zoo.bundle("portable", **overrides)
    folder = tmp_path_factory.mktemp("own")
    source = save_own(folder / "model", OWN_STATED)
    return export(source, folder / "bundle", target="portable", module=OWN_MODULE)


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.graph)


@pytest.fixture(scope="module")
def evaluator(graph: onnx.ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(graph)


@pytest.fixture(scope="module")
def torch_model(bundle: Bundle) -> Decoder:
    return load_model(open_checkpoint(bundle.source, bundle.module))


def test_who_shares(bundle: Bundle) -> None:
    if bundle.config().get("num_kv_shared_layers"):
        assert bundle.layout.kv_owner == (0, 1, 2, 1, 2)
        assert bundle.layout.window == (5, None, 5, None, 5)
    if bundle.module:
        assert bundle.layout.kv_owner == (0, 1, 1, 0)


def empty_caches(graph: onnx.ModelProto, batch: int) -> Arrays:
    """Stale numbers for every cache input: what is beyond a row's length must not matter."""
    caches = {}
    for value in graph.graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, dim = (d.dim_value for d in value.type.tensor_type.shape.dim)
            caches[value.name] = np.full((batch, heads, CAPACITY, dim), 50, np.float32)
    return caches


def step(
    evaluator: ReferenceEvaluator,
    caches: Arrays,
    chunks: list[list[int]],
    held: list[int],
    keep: int | None = None,
) -> np.ndarray:
    """Run one call, padded on the right; update the caches; return the logits."""
    longest = max(map(len, chunks))
    input_ids = np.zeros((len(chunks), longest), np.int64)
    for row, chunk in zip(input_ids, chunks, strict=True):
        row[: len(chunk)] = chunk
    lengths = [start + len(chunk) for start, chunk in zip(held, chunks, strict=True)]
    feeds = {
        "input_ids": input_ids,
        "write_indices": np.array(held, np.int64),
        "kv_lengths": np.array(lengths, np.int64),
        **caches,
    }
    if keep is not None:
        feeds["logits_to_keep"] = np.array(keep, np.int64)
    outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    for name in caches:
        caches[name] = outputs[name.replace("past_key_values", "present")]
    return outputs["logits"]


def test_prefill_then_ragged_decode(
    graph: onnx.ModelProto, evaluator: ReferenceEvaluator, torch_model: Decoder
) -> None:
    prompts = [1, 9, 4]
    texts = [tokens_of(prompt + 6, seed) for seed, prompt in enumerate(prompts)]
    expected = [stateless_logits(torch_model, text) for text in texts]
    caches = empty_caches(graph, len(texts))
    first = [text[:prompt] for text, prompt in zip(texts, prompts, strict=True)]
    logits = step(evaluator, caches, first, [0, 0, 0], keep=1)
    for at in range(6):
        assert logits.shape == (3, 1, VOCAB)
        held = [prompt + at for prompt in prompts]
        for row, length in enumerate(held):
            assert np.abs(logits[row, 0] - expected[row][length - 1]).max() <= CLOSE
        logits = step(evaluator, caches, [[t[n]] for t, n in zip(texts, held, strict=True)], held)
    for row, text in enumerate(texts):
        for group, kv in enumerate(stateless_kv(torch_model, text)):
            for part, cached in zip(("key", "value"), kv, strict=True):
                got = caches[f"past_key_values.{group}.{part}"][row][:, : len(text)]
                assert np.abs(got - cached).max() <= CLOSE


def test_ragged_chunks_after_held_tokens(
    graph: onnx.ModelProto, evaluator: ReferenceEvaluator, torch_model: Decoder
) -> None:
    """Rows of different lengths take different numbers of new tokens in one call."""
    texts = [tokens_of(10, 3), tokens_of(10, 4)]
    expected = [stateless_logits(torch_model, text) for text in texts]
    caches = empty_caches(graph, 2)
    held = [2, 7]
    step(evaluator, caches, [texts[0][:2], texts[1][:7]], [0, 0])
    logits = step(evaluator, caches, [texts[0][2:7], texts[1][7:9]], held, keep=2)
    for row, end in ((0, 7), (1, 9)):
        assert np.abs(logits[row] - expected[row][end - 2 : end]).max() <= CLOSE


@pytest.mark.parametrize("keep", [None, 1, 3, 5, 99])
def test_logits_to_keep_is_an_input_with_a_default(
    graph: onnx.ModelProto,
    evaluator: ReferenceEvaluator,
    torch_model: Decoder,
    keep: int | None,
) -> None:
    """Not fed, or more than there are: all of the call's; a shorter row has its own first."""
    assert "logits_to_keep" in {value.name for value in graph.graph.input}
    assert "logits_to_keep" in {value.name for value in graph.graph.initializer}
    texts = [tokens_of(5, 1), tokens_of(2, 2)]
    logits = step(evaluator, empty_caches(graph, 2), texts, [0, 0], keep)
    kept = min(5, 99 if keep is None else keep)
    assert logits.shape == (2, kept, VOCAB)
    for row, text in enumerate(texts):
        wanted = stateless_logits(torch_model, text)[-kept:]
        assert np.abs(logits[row, : len(wanted)] - wanted).max() <= CLOSE
