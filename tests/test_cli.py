"""The command line as a user meets it: streams, exit codes, messages, JSON, speed of --help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cla_export

DEMO = cla_export.demo_checkpoint()


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cla_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    done = run("export", DEMO, folder, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["target"] == "onnxruntime"
    return folder


def test_help_needs_nothing_heavy():
    code = (
        "import sys; sys.argv = ['cla-export', '--help']\n"
        "from cla_export.cli import app\n"
        "try: app()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'polygraphy', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_version():
    assert run("--version").stdout.strip() == f"cla-export {cla_export.__version__}"


def test_inspect_json_goes_to_stdout():
    found = json.loads(run("inspect", DEMO, "--json").stdout)
    assert found["layout"]["kv_owner"] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_generate_streams_prompt_and_text(bundle):
    done = run("generate", bundle, "Blessed are", "-n", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Blessed are")
    assert len(done.stdout.split()) > 6
    same = json.loads(run("generate", bundle, "Blessed are", "-n", 12, "--json").stdout)
    assert same["prompt"] + same["text"] == done.stdout.rstrip("\n")


def test_torch_backend_generates_the_same_text(bundle):
    one = run("generate", bundle, "Verily, verily, I say unto", "-n", 24)
    other = run("generate", bundle, "Verily, verily, I say unto", "-n", 24, "--backend", "torch")
    assert other.returncode == 0, other.stderr
    assert one.stdout == other.stdout


def test_sampling_is_seeded(bundle):
    options = ("-n", 24, "--temperature", 1.0)
    texts = [run("generate", bundle, "And", *options, "--seed", s).stdout for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_parity_breach_exits_1_and_names_the_place(bundle, tmp_path):
    import onnx_ir as ir

    from cla_export.bundle import sha256

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in bundle.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    model = ir.load(broken / "model.onnx")
    node = next(n for n in model.graph if n.metadata_props.get("cla.layer") == "5")
    scale = node.attributes.pop("scale").as_float()
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * 1.1)
    ir.save(model, broken / "model.onnx")
    refused = run("parity", broken)
    assert refused.returncode == 2
    assert "changed" in refused.stderr
    manifest = json.loads((broken / "bundle.json").read_text())
    manifest["files"]["model.onnx"] = {
        "bytes": (broken / "model.onnx").stat().st_size,
        "sha256": sha256(broken / "model.onnx"),
    }
    (broken / "bundle.json").write_text(json.dumps(manifest))
    failed = run("parity", broken, "--report", tmp_path / "report")
    assert failed.returncode == 1
    assert "layer 5, group 2" in failed.stderr
    report = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert report["passed"] is False
    assert report["divergence"]["layer"] == 5
    assert "<failure" in (tmp_path / "report" / "parity.xml").read_text()
    assert "FAILED" in (tmp_path / "report" / "parity.md").read_text()


def test_bench_prints_json_and_writes_files(bundle, tmp_path):
    few = ("--batch", "1,2", "--context", "16", "--steps", 2, "--prompt", 32, "--threads", 1)
    files = [tmp_path / f"bench.{kind}" for kind in ("json", "md", "svg")]
    written = ("--output", files[0], "--markdown", files[1], "--plot", files[2])
    done = run("bench", bundle, *few, *written, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["batch"] for row in found["rows"]] == [1, 2, 1]
    assert found["command"].startswith("cla-export bench ")
    assert json.loads(files[0].read_text()) == found
    assert all(file.stat().st_size > 200 for file in files)

    for row in found["rows"]:
        row |= {"ms_per_step": 1e-6, "ms_p10": 1e-6, "ms_p90": 1e-6}
    files[0].write_text(json.dumps({**found, "graph": "another.onnx"}))
    slower = run("bench", bundle, *few, "--phase", "decode", "--compare", files[0])
    assert slower.returncode == 1
    lines = slower.stderr.splitlines()
    assert "was 'another.onnx' then" in lines[0]
    assert [line.partition(":")[0] for line in lines[2:]] == [
        "decode, batch 1, context 16",
        "decode, batch 2, context 16",
        "prefill, batch 1, context 32",
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["inspect", "nowhere"], "does not exist"),
        (["export", "nowhere", "out"], "nowhere"),
        (["export", str(DEMO), str(DEMO)], "exists already"),
        (["export", str(DEMO), str(DEMO), "--force"], "not a bundle"),
        (["parity", str(DEMO)], "a model folder; expected a folder with bundle.json"),
        (["generate", "nowhere", "hi"], "bundle.json"),
        (["plan", str(DEMO), "--memory", "16 elephants", "--context", "8"], "memory size"),
        (["export", str(DEMO), "out", "--target", "elsewhere"], "elsewhere"),
        (["bench", str(DEMO)], "a model folder; expected a folder with bundle.json"),
        (["bench", str(DEMO), "--batch", "1,x"], "--batch is '1,x'; expected whole numbers"),
        (["bench", str(DEMO), "--output", "no/bench.json"], "there is no folder no"),
        (["bench", str(DEMO), "--plot", "bench.txt"], "plots are written as"),
    ],
)
def test_bad_input_exits_2_without_a_traceback(arguments, word, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert word in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_prompts(bundle):
    long = run("generate", bundle, "holy " * 4000)
    assert long.returncode == 2
    assert "the capacity is 2048" in long.stderr
    assert run("generate", bundle, "").returncode == 2
    assert run("generate", bundle, "x", "--temperature", -1).returncode == 2


def test_no_colour_and_narrow_terminals(bundle):
    done = run("inspect", bundle, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "80"})
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_demo_runs_the_main_job(tmp_path):
    done = run("demo", tmp_path / "demo-bundle")
    assert done.returncode == 0, done.stderr
    for line in ("$ cla-export inspect", "$ cla-export export", "PASSED", "And it came to pass"):
        assert line in done.stdout
    assert Path(tmp_path / "demo-bundle" / "model.onnx").is_file()
