"""Correct bundles pass, whatever the weights, prompts, threads and chunks.

`scripts/false_alarms.py` makes hundreds of such trials.
"""

import pytest
from correct import Trial, worst_share
from models_zoo import Zoo


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("seed", [0, 8, 12])  # one layout, both targets; lengths, threads
def test_a_correct_bundle_passes(seed, dtype, zoo: Zoo):
    trial = Trial(seed, dtype)
    report = trial.run(zoo)
    assert report.passed, f"{trial}: {worst_share(report)}"
