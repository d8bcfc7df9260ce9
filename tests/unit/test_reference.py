"""The two ways PyTorch computes what a bundle is judged by."""

import numpy as np
import pytest
import torch
from models_zoo import MIXED, Zoo, tokens_of

from cla_export.compare.probe import torch_tensors
from cla_export.compare.reference import Reference
from cla_export.models.checkpoint import load_model
from cla_export.models.cla import ClaDecoder
from cla_export.quantization import Quantization

TOKENS = np.array(tokens_of(20), np.int64)


@pytest.fixture(autouse=True, params=["small", "large"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "large":
        monkeypatch.setattr("cla_export.compare.reference._SMALL", 0)


def reference(model: ClaDecoder, quantization: Quantization | None = None) -> Reference:
    return Reference.of(model, None, quantization)


def test_exact_is_the_model_in_float64_and_leaves_it_as_it_was(zoo: Zoo) -> None:
    model = zoo.model(**MIXED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, groups = reference(model).exact.forward(TOKENS)
    wide = load_model(zoo.checkpoint(**MIXED), torch.float64)
    with torch.inference_mode():
        ids, positions = torch.from_numpy(TOKENS)[None], torch.arange(20)[None]
        expected, kv = wide.forward_with_kv(ids, positions)
    assert np.array_equal(logits, expected[0].numpy())
    assert np.array_equal(groups[1][0], kv[1][0][0].transpose(0, 1).numpy())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.dtype == torch.float32 for value in after.values())


def test_an_error_inside_leaves_the_model_as_it_was(zoo: Zoo) -> None:
    model = zoo.model(**MIXED)
    with pytest.raises(IndexError):
        reference(model).exact.forward(np.array([10_000]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    native = reference(model).native.forward(TOKENS)[0]
    assert np.abs(native - reference(model).exact.logits(TOKENS)).max() < 1e-4


def test_held_tokens_come_before_the_row(zoo: Zoo) -> None:
    """What a longer row's first tokens leave is a cache that its last ones continue."""
    exact = reference(zoo.model(**MIXED)).exact
    whole, groups = exact.forward(TOKENS)
    held = [(key[:15], value[:15]) for key, value in groups]
    rest, new = exact.forward(TOKENS[15:], held)
    assert np.abs(rest - whole[15:]).max() < 1e-12
    assert np.abs(new[0][0] - groups[0][0][15:]).max() < 1e-12


def test_quantised_activations_are_rounded_block_by_block(zoo: Zoo) -> None:
    model = zoo.model(**MIXED)
    sides = reference(model, Quantization(8))
    error = np.abs(sides.native.logits(TOKENS) - sides.exact.logits(TOKENS))
    assert 1e-3 < error.mean() < 1e-1
    plain = reference(model).native.logits(TOKENS)
    assert np.array_equal(plain, reference(model).native.logits(TOKENS)), "hooks are gone"


def test_steps_go_on_from_what_the_bundle_made(zoo: Zoo) -> None:
    """Each step is recomputed from what it is given, so an error shows in its own step alone."""
    exact = reference(zoo.model(**MIXED)).exact
    right = torch_tensors(exact, TOKENS, {})
    again = torch_tensors(exact, TOKENS, right)
    assert right.keys() == again.keys()
    assert {role for _, role in right} == {"q", "k", "v", "attention", "attention_branch", "mlp",
                                           "output"}  # fmt: skip
    assert not any(key in right for key in ((2, "k"), (2, "v"))), "layer 2 reads group 0"
    assert all(np.allclose(right[key], again[key], rtol=0, atol=1e-12) for key in right)
    wrong = {**right, (1, "attention"): right[1, "attention"] + 0.1}
    seen = torch_tensors(exact, TOKENS, wrong)
    off = [key for key in right if not np.allclose(seen[key], wrong[key], rtol=0, atol=1e-9)]
    assert sorted(off) == [(1, "attention"), (1, "attention_branch")]
