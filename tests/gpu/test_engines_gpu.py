"""Engines run where a TensorRT and its GPU are: parity over them, captured decode, refit.

No machine that this was developed on has either, so these tests have only ever been skipped.
"""

import shutil
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from models_zoo import MIXED, Zoo

from cla_export.bundle import Bundle
from cla_export.compare.gate import compare_bundle
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.tensorrt import TensorRTExecutor
from cla_export.engines.tensorrt_build import FLAVOURS, RTX_CAPABILITIES, build
from cla_export.errors import MissingEnvironment


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    """A flavour that is installed, on a GPU that it runs on."""
    if util.find_spec(FLAVOURS[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    try:
        capability = CudaMemory().compute_capability
    except MissingEnvironment as error:
        pytest.skip(str(error))
    if request.param == "tensorrt-rtx" and capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX has no engines for compute capability {capability}")
    return str(request.param)


def engine_of(zoo: Zoo, folder: Path, flavour: str, attention: str, **options: bool) -> Bundle:
    made = zoo.bundle(flavour, "fp16", attention=attention, **MIXED)
    shutil.copytree(made.folder, folder)
    bundle = replace(made, folder=folder)
    build(bundle, capacity=48, slots=5, chunk=7, **options)
    return bundle


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_parity_over_an_engine(zoo: Zoo, tmp_path: Path, flavour: str, attention: str):
    report = compare_bundle(engine_of(zoo, tmp_path / "b", flavour, attention))
    assert report.backend == flavour
    assert report.passed, report.faults


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_captured_steps_give_what_plain_ones_do(zoo: Zoo, tmp_path: Path, flavour: str, attention):
    bundle = engine_of(zoo, tmp_path / "b", flavour, attention)
    logits = []
    for graphs in (True, False):
        executor = TensorRTExecutor(bundle, graphs=graphs)
        for slot in range(3):
            executor.prefill(slot, [1 + slot, 2, 3, 4], 0)
        steps = [executor.decode(range(3), [5, 6, 7], [4 + step] * 3) for step in range(6)]
        logits.append(np.stack(steps))
    assert np.array_equal(*logits)


def test_weights_that_were_left_out_come_back(zoo: Zoo, tmp_path: Path, flavour: str):
    bundle = engine_of(zoo, tmp_path / "b", flavour, "native", refit=True, strip=True)
    assert compare_bundle(bundle).passed
