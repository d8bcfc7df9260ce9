"""deploy triton without Triton: what is written, what is refused, what its model does."""

import importlib
import json
import re
import sys
import threading
import time

import fake_triton
import numpy as np
import pytest
from fake import FakeExecutor, expected
from fake_triton import MetricFamily, Request, texts
from running import PATIENCE, wait_until
from typer.testing import CliRunner

from cla_export.bundle import Bundle
from cla_export.cli import app
from cla_export.deploy.triton import write_model
from cla_export.deploy.triton_config import INPUTS, OUTPUTS, Parameters, read_parameters
from cla_export.errors import BadInput, BundleError
from cla_export.serve.engine import Limits
from cla_export.serve.model import ServedModel
from cla_export.serve.pool import size_pool
from cla_export.serve.server import Opened, Options

_PARAMETER = re.compile(r'parameters \{ key: (".*?"), value: \{ string_value: (".*") \} \}')
PROMPT = [3, 1, 4, 1, 5]


def configuration(folder):
    """A model's parameters as Triton gives them."""
    found = _PARAMETER.findall((folder / "config.pbtxt").read_text())
    return {
        "parameters": {json.loads(key): {"string_value": json.loads(text)} for key, text in found}
    }


@pytest.fixture
def triton_model(monkeypatch):
    """The module, over the fake backend."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.backend())
    monkeypatch.setattr(MetricFamily, "made", [])
    names = [f"cla_export.deploy.triton_{name}" for name in ("metrics", "tensors", "model")]
    yield [importlib.import_module(name) for name in names][-1]
    for name in names:
        del sys.modules[name]


@pytest.fixture
def start(triton_model, tmp_path):
    """Starts a model over a fake executor; at the end it is finalized."""
    started = []

    def start(executor=None, **options):
        executor = executor or FakeExecutor()
        model = triton_model.TritonPythonModel()
        pool = size_pool(executor.layout, "float32", executor.capacity, executor.slots, None)
        bundle = Bundle(tmp_path, {"dtype": "float32"}, executor.layout)
        served = ServedModel("fake", 0, executor.capacity, executor.vocab_size, None, None)
        opened = Opened(bundle, served, executor, pool)
        model.start(opened, Options(**options), "fake", "1")
        started.append(model)
        return model

    yield start
    for model in started:
        model.finalize()


def asks(count=4, **given):
    """A request for so many tokens after PROMPT; the rest as for `fake_triton.Request`."""
    tensors = {
        "input_ids": np.array(given.pop("prompt", PROMPT), np.int64),
        "max_tokens": np.array([count], np.int32),
        "temperature": np.array([0], np.float32),
    }
    return Request({**tensors, **given.pop("inputs", {})}, **given)


def run(model, *requests):
    model.execute(list(requests))
    for request in requests:
        assert request.ended.wait(PATIENCE)


def test_a_written_model_reads_back(demo_bundle, tmp_path):
    given = Parameters(
        bundle=str(demo_bundle),
        kv_memory="64MiB",
        max_len=512,
        request_timeout=30,
        prefill_budget=20,
    )
    model = write_model(tmp_path / "repository", given, name="bible")
    assert model.folder == tmp_path / "repository" / "bible"
    options = read_parameters(configuration(model.folder)).to_options(model.folder / "1")
    meant = Options(kv_memory=64 * 2**20, max_len=512, request_seconds=30.0, prefill_seconds=0.02)
    assert options == meant
    text = (model.folder / "config.pbtxt").read_text()
    for spec in INPUTS:
        assert f'input {{ name: "{spec.name}", data_type: {spec.triton_type}' in text
    for spec in OUTPUTS:
        assert f'output {{ name: "{spec.name}", data_type: {spec.triton_type}' in text
    assert "decoupled: true" in text
    assert "TritonPythonModel" in (model.folder / "1" / "model.py").read_text()


def test_a_copy_is_inside_and_found_from_the_version(demo_bundle, tmp_path):
    model = write_model(tmp_path, Parameters(bundle=str(demo_bundle)), copy=True)
    parameters = read_parameters(configuration(model.folder))
    assert parameters.bundle == "bundle" and model.bundle == model.folder / "1" / "bundle"
    assert sorted(path.name for path in model.bundle.iterdir()) == sorted(
        path.name for path in demo_bundle.iterdir()
    )


def test_another_model_of_the_repository_stays(demo_bundle, tmp_path):
    parameters = Parameters(bundle=str(demo_bundle))
    write_model(tmp_path, parameters, name="one")
    write_model(tmp_path, parameters, name="two")
    with pytest.raises(BundleError, match="exists already"):
        write_model(tmp_path, parameters, name="one")
    write_model(tmp_path, parameters, name="one", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_folder_that_is_no_model_is_not_replaced(demo_bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(BundleError, match="not a Triton model"):
        write_model(tmp_path, Parameters(bundle=str(demo_bundle)), name="mine", force=True)


@pytest.mark.parametrize(
    ("given", "name", "said"),
    [
        ({"kv_memory": "1KiB"}, None, "does not hold one slot"),
        ({"kv_memory": "much"}, None, "much"),
        ({"slots": 0}, None, "--slots is 0"),
        ({"max_len": 9999}, None, "2048 positions"),
        ({"backend": "tensorrt"}, None, "exported for onnxruntime"),
        ({}, "a/b", "no name for a model"),
    ],
)
def test_what_would_not_load_is_refused_at_once(demo_bundle, tmp_path, given, name, said):
    with pytest.raises(BadInput, match=said):
        write_model(tmp_path / "r", Parameters(bundle=str(demo_bundle), **given), name=name)
    assert not (tmp_path / "r").exists()


def test_the_command_writes_what_it_says(demo_bundle, tmp_path):
    arguments = ["deploy", "triton", str(demo_bundle), str(tmp_path), "--slots", "3", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "demo")
    assert read_parameters(configuration(tmp_path / "demo")).slots == 3


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "'bundle'"),
        ({"bundle": "b", "slots": "many"}, "'slots'"),
        ({"bundle": "b", "kv_memroy": "1GiB"}, "'kv_memroy'"),
    ],
)
def test_a_wrong_parameter_is_named(parameters, said):
    config = {"parameters": {key: {"string_value": text} for key, text in parameters.items()}}
    with pytest.raises(BadInput, match=said):
        read_parameters(config)


def test_parameters_for_triton_itself_are_let_be():
    given = {"bundle": "b", "EXECUTION_ENV_PATH": "/env.tar.gz"}
    config = {"parameters": {key: {"string_value": text} for key, text in given.items()}}
    assert read_parameters(config) == Parameters(bundle="b")


def test_a_model_opens_the_bundle_it_was_written_for(triton_model, demo_bundle, tmp_path):
    written = write_model(tmp_path, Parameters(bundle=str(demo_bundle), slots=2, max_len=128))
    model = triton_model.TritonPythonModel()
    arguments = {
        "model_name": "demo",
        "model_version": "1",
        "model_repository": str(written.folder),
    }
    model.initialize({**arguments, "model_config": json.dumps(configuration(written.folder))})
    request = Request(
        {
            "text_input": texts("In the beginning"),
            "max_tokens": np.array([12], np.int32),
            "temperature": np.array([0], np.float32),
        }
    )
    run(model, request)
    model.finalize()
    assert len(request.responses) == 1
    assert request.values("text_output")[0].decode().strip()
    assert request.values("prompt_tokens") == [4] and request.values("completion_tokens") == [12]
    written.folder.joinpath("1", "bundle").mkdir()
    config = {"parameters": {"bundle": {"string_value": "bundle"}}}
    with pytest.raises(triton_model.pb.TritonModelException, match=r"demo: .*not a bundle"):
        model.initialize({**arguments, "model_config": json.dumps(config)})


def test_requests_of_one_call_run_together(start):
    executor = FakeExecutor(slots=3)
    model = start(executor)
    requests = [asks(8, prompt=[token]) for token in (1, 2, 3, 4)]
    run(model, *requests)
    for request, token in zip(requests, (1, 2, 3, 4), strict=True):
        assert request.values("token_ids") == expected([token], 8)
        assert request.values("finish_reason") == [b"length"]
    assert max(len(starts) for _, starts, _ in executor.calls) == 3


def test_a_stream_is_told_piece_by_piece(start):
    request = asks(6, inputs={"stream": np.array([True])})
    run(start(), request)
    assert request.values("token_ids") == expected(PROMPT, 6)
    assert request.values("completion_tokens") == [1, 2, 3, 4, 5, 6]
    assert request.values("finish_reason") == [b""] * 5 + [b"length"]


def test_a_float_is_the_number_that_was_meant(triton_model):
    inputs = {"temperature": np.array([0.7], np.float32), "top_p": np.array([0.9], np.float32)}
    body = importlib.import_module("cla_export.deploy.triton_tensors").read_body(
        asks(inputs=inputs)
    )
    assert (body.temperature, body.top_p) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request({}), "0 of them were given"),
        (asks(inputs={"text_input": texts("a")}), "2 of them were given"),
        (Request({"text_input": texts("a")}), "no tokenizer"),
        (asks(parameters={"temprature": 0.1}), "temprature: this model does not have"),
        (asks(inputs={"top_p": np.array([2], np.float32)}), "top_p"),
        (asks(inputs={"stop": np.array([b"\xff"], np.object_)}), "stop: not UTF-8"),
        (asks(inputs={"min_tokens": np.array([9], np.int32)}), "min_tokens is 9"),
        (asks(100), "this model's limit is 64"),
        (asks(0), "max_tokens"),
        (asks(prompt=[]), "the prompt is empty|expected a string"),
        (asks(prompt=[99]), "token id 99; expected 0 to 49"),
    ],
)
def test_a_bad_request_is_an_error_and_nothing_else(start, request_, said):
    model = start()
    fine = asks()
    run(model, request_, fine)
    (response,) = request_.responses
    assert re.search(said, str(response.error)) and response.error.code == "invalid"
    assert fine.values("token_ids") == expected(PROMPT, 4)


def test_triton_s_own_parameters_are_none_of_ours(start):
    request = asks(parameters={"triton_enable_empty_final_response": True})
    run(start(), request)
    assert request.values("token_ids") == expected(PROMPT, 4)


def test_a_cancelled_request_ends_and_frees_its_slot(start):
    executor = FakeExecutor(slots=1, capacity=4096)
    executor.before = lambda _rows: time.sleep(0.001)
    model = start(executor)
    request, after = asks(4000, inputs={"stream": np.array([True])}), asks()
    model.execute([request])
    wait_until(lambda: request.responses)
    request.cancelled = True
    run(model, after)
    assert request.ended.is_set() and request.responses[-1].error.code == "cancelled"
    assert len(request.responses) < 4000
    assert after.values("token_ids") == expected(PROMPT, 4)


def test_a_full_queue_refuses(start):
    executor, held = FakeExecutor(slots=1), threading.Event()
    executor.before = lambda _rows: held.wait(PATIENCE)
    model = start(executor, limits=Limits(queued_requests=1))
    requests = [asks() for _ in range(4)]
    model.execute(requests)
    held.set()
    assert all(request.ended.wait(PATIENCE) for request in requests)
    errors = [request.responses[-1].error for request in requests if request.responses[-1].error]
    assert errors and {error.code for error in errors} == {"unavailable"}
    assert any(request.responses[-1].error is None for request in requests)


def test_triton_s_timeout_counts_where_it_is_shorter(start):
    executor = FakeExecutor(slots=1, capacity=4096)
    executor.before = lambda _rows: time.sleep(0.002)
    request = asks(4000, timeout=50_000)  # microseconds
    run(start(executor), request)
    assert request.responses[-1].error.code == "internal"
    assert "time" in str(request.responses[-1].error)


def test_a_step_that_hangs_ends_its_requests(start):
    executor, held = FakeExecutor(slots=1), threading.Event()
    executor.before = lambda _rows: held.wait(PATIENCE)
    request = asks()
    try:
        run(start(executor, limits=Limits(step_seconds=0.05)), request)
    finally:
        held.set()
    assert "stalled" in str(request.responses[-1].error)
    assert request.responses[-1].error.code == "unavailable"


def test_a_dead_engine_says_so_to_clients_and_in_metrics(start):
    executor = FakeExecutor(slots=1)

    def fail(_rows):
        raise RuntimeError("the device is gone")

    executor.before = fail
    model = start(executor)
    failed = [asks() for _ in range(3)]
    for request in failed:
        run(model, request)
        assert "the device is gone" in str(request.responses[-1].error)
    wait_until(lambda: model.engine.dead)
    late = asks()
    run(model, late)
    assert "dead" in str(late.responses[-1].error)
    assert late.responses[-1].error.code == "unavailable"
    dead = {"model": "fake", "version": "1", "state": "dead"}
    wait_until(lambda: [one.now for one in MetricFamily.made if one.labels == dead] == [1.0])


def test_an_answer_that_cannot_be_sent_is_only_its_own_trouble(start):
    model = start(FakeExecutor(slots=2))
    broken, fine = asks(20, inputs={"stream": np.array([True])}, fails=True), asks(8)
    model.execute([broken])
    run(model, fine)
    assert fine.values("token_ids") == expected(PROMPT, 8)
    assert broken.ended.wait(PATIENCE)


def test_metrics_are_told_with_the_model_s_name(start):
    run(start(), asks(5))

    def value(name):
        return [metric.now for metric in MetricFamily.made if metric.name == name]

    wait_until(lambda: value("cla_export_generation_tokens_total") == [5.0])
    assert value("cla_export_num_slots") == [4.0]
    assert all(one.labels["model"] == "fake" for one in MetricFamily.made)
    assert not any(one.name.endswith(("_created", "_bucket")) for one in MetricFamily.made)
