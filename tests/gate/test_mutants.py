"""Every kind of export bug is caught at the gate's default thresholds, and found where it is.

Here each kind is committed on one layout in turn; `scripts/kill_table.py` runs all kinds on all
layouts.
"""

import pytest
from models_zoo import Zoo
from mutants import LAYOUTS, MUTANTS, Subject, run

from cla_export.compare.cases import case_length, token_case
from cla_export.compare.files import to_markdown
from cla_export.compare.gate import compare_bundle
from cla_export.tokenizer import token_stream

NAMES = list(MUTANTS)


@pytest.mark.parametrize("name", NAMES)
def test_is_caught_and_placed(name, zoo: Zoo, tmp_path_factory):
    for layout in _in_turn(name):
        folder = tmp_path_factory.mktemp("mutant")
        outcome = run(MUTANTS[name], zoo.bundle(**LAYOUTS[layout]), folder)
        if outcome is None or outcome.invisible is not None:
            continue
        assert outcome.problem() is None, f"{name} on {layout}: {outcome.problem()}"
        return
    pytest.fail(f"{name} applies to no layout")


def _in_turn(name: str) -> list[str]:
    """All layouts, beginning with another one for every kind."""
    layouts = list(LAYOUTS)
    first = NAMES.index(name) % len(layouts)
    return layouts[first:] + layouts[:first]


def test_damage_to_a_token_that_no_case_reads_is_seen_in_the_weights(zoo: Zoo, tmp_path):
    bundle = zoo.bundle(kv_owner=(0, 0), vocab_size=9001, tie_word_embeddings=False)
    stream, _ = token_stream(bundle.folder, bundle.vocab_size, None)
    length = case_length(bundle.layout, bundle.max_positions)
    rare = token_case(length, bundle.vocab_size, bundle.special_tokens()).feed["tokens"]
    read = {*stream, *rare.flat}
    unseen = next(token for token in range(9001) if token not in read)
    subject = Subject(bundle)
    table = subject.weight("model.embed_tokens.weight")
    table[unseen] = 0
    subject.set_weight("model.embed_tokens.weight", table)
    report = compare_bundle(subject.save(tmp_path), threads=1)
    assert all(result.passed for result in report.tensors)
    assert not report.passed
    assert report.faults == ["model.embed_tokens.weight: 24 of 216024 values are not the model's"]
    assert report.faults[0] in to_markdown(report)


def test_there_are_many_kinds():
    assert len(MUTANTS) >= 100
    abouts = [mutant.about for mutant in MUTANTS.values()]
    assert len(set(abouts)) == len(abouts)
