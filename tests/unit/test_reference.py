"""The ways PyTorch computes what a bundle is judged by."""

import numpy as np
import pytest
import torch
from models_zoo import MIXED, Zoo, tokens_of
from torch.nn.functional import scaled_dot_product_attention

from cla_export.compare.probe import _sensitivity, torch_tensors
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


def test_sums_in_other_orders_are_other_draws_of_the_same_error(zoo: Zoo) -> None:
    sides = reference(zoo.model(**MIXED))
    exact = sides.exact.logits(TOKENS)
    errors = [side.logits(TOKENS) - exact for side in sides.yardstick]
    sizes = [np.abs(error).mean() for error in errors]
    assert max(sizes) < 2 * min(sizes)
    for one in range(3):
        for other in range(one):
            assert abs(np.corrcoef(errors[one].ravel(), errors[other].ravel())[0, 1]) < 0.9


@pytest.mark.parametrize("mask", ["causal", "bool", "float", "none"])
def test_attention_moves_no_further_than_its_sensitivity_says(mask: str) -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(1, 4, 6, 8) * 3, normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    kinds = {"causal": {"is_causal": True}, "bool": {"attn_mask": allowed}, "none": {}}
    how = {**kinds, "float": {"attn_mask": bias}}[mask]
    y = scaled_dot_product_attention(q, k, v, **how, enable_gqa=True)
    limit = _sensitivity(q, k, v, y, **how, enable_gqa=True)
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    seen, step = 0.0, 1e-6
    for _ in range(200):
        moved = scores * (1 + step * (2 * torch.rand(scores.shape, generator=generator) - 1).sign())
        moved = moved if mask == "none" else moved + bias
        new = moved.softmax(-1) @ v.repeat_interleave(2, 1)
        seen = max(seen, float((new - y).abs().max()) / step)
    assert 0.1 * limit < seen < limit


def test_steps_go_on_from_what_the_bundle_made(zoo: Zoo) -> None:
    """Each step is recomputed from what it is given, so an error shows in its own step alone."""
    exact = reference(zoo.model(**MIXED)).exact
    right = torch_tensors(exact, TOKENS, {})[0]
    again = torch_tensors(exact, TOKENS, right)[0]
    assert right.keys() == again.keys()
    assert {role for _, role in right} == {"q", "k", "v", "attention", "attention_branch", "mlp",
                                           "output"}  # fmt: skip
    assert not any(key in right for key in ((2, "k"), (2, "v"))), "layer 2 reads group 0"
    assert all(np.allclose(right[key], again[key], rtol=0, atol=1e-12) for key in right)
    wrong = {**right, (1, "attention"): right[1, "attention"] + 0.1}
    seen = torch_tensors(exact, TOKENS, wrong)[0]
    off = [key for key in right if not np.allclose(seen[key], wrong[key], rtol=0, atol=1e-9)]
    assert sorted(off) == [(1, "attention"), (1, "attention_branch")]
