"""deploy kubernetes: what is written is what a cluster takes, and fits the server it starts."""

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from cla_export.bundle import open_bundle
from cla_export.cli import app
from cla_export.deploy.host_memory import memory_to_serve
from cla_export.deploy.image import requirements
from cla_export.deploy.kubernetes import plan_deployment, write_manifests
from cla_export.errors import BadInput, BundleError
from cla_export.serve.gate import OPEN
from cla_export.serve.pool import size_pool

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.31", kubernetes_validate.latest_version())
KSERVE_ONLY = ("minReplicas", "maxReplicas")  # of a predictor; the rest of it is a pod's


def hadolint(file: Path) -> subprocess.CompletedProcess:
    tool = Path(sys.executable).parent / "hadolint"
    return subprocess.run([tool, file], capture_output=True, text=True)


def documents(folder: Path) -> dict[str, dict]:
    found = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


@pytest.fixture(scope="module")
def written(demo_bundle, tmp_path_factory):
    """Everything there is: several pods, a claim."""
    out = tmp_path_factory.mktemp("cluster") / "out"
    options = {"replicas": (2, 6), "claim": "models", "kv_memory": 64 * 2**20, "cpus": 3}
    return write_manifests(demo_bundle, out, **options), documents(out)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(written, version):
    _, objects = written
    kinds = ["Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert list(objects) == kinds
    for one in objects.values():
        kubernetes_validate.validate(one, version, strict=True)


def test_the_validator_would_notice(written):
    _, objects = written
    wrong = yaml.safe_load(yaml.safe_dump(objects["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_objects_find_each_other(written):
    deployment, objects = written
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    assert "replicas" not in objects["Deployment"]["spec"], "the two would fight over it"
    assert deployment.pool.slots == 16
    assert scaler["metrics"][0]["pods"]["target"]["averageValue"] == "12"


def test_a_pod_has_what_the_server_needs(written):
    deployment, objects = written
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] in ports
        assert asked["path"] in OPEN, "it would need a key"
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] in ports
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    arguments = dict(argument.split("=", 1) for argument in container["args"])
    keys = Path(arguments["--api-key-file"])
    assert str(keys.parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert keys.name == "keys"
    assert arguments["--threads"] == container["resources"]["requests"]["cpu"] == "3"
    assert arguments["--slots"] == str(deployment.pool.slots)
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(arguments["--shutdown-timeout"])
    assert pod["terminationGracePeriodSeconds"] > wait + drain
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert (
        container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    )


def test_the_server_takes_the_arguments(written, demo_bundle, tmp_path):
    (container,) = written[1]["Deployment"]["spec"]["template"]["spec"]["containers"]
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    arguments = [one.replace("/etc/cla-export/keys", str(keys)) for one in container["args"]]
    entry = [str(demo_bundle), "--host", "0.0.0.0", "--port", "8000"]
    done = CliRunner().invoke(app, ["serve", *entry, *arguments, "--check"])
    assert done.exit_code == 0, done.output


def test_memory_grows_by_what_the_pool_does(demo_bundle):
    bundle = open_bundle(demo_bundle)
    small, large = (size_pool(bundle.layout, "float32", 2048, slots, None) for slots in (1, 9))
    grown = memory_to_serve(bundle, large) - memory_to_serve(bundle, small)
    assert 8 * small.bytes_per_slot <= grown < 9 * small.bytes_per_slot
    weights = (demo_bundle / "model.onnx.data").stat().st_size
    assert memory_to_serve(bundle, small) > weights + small.total


def test_an_image_with_the_bundle(demo_bundle, tmp_path):
    deployment = write_manifests(demo_bundle, tmp_path / "out", name="bible")
    text = (tmp_path / "out" / "Dockerfile").read_text()
    assert f"-t {deployment.image} {demo_bundle}\n" in text and "\nCOPY . /bundle\n" in text
    assert deployment.image.startswith("bible:") and len(deployment.image) == len("bible:") + 12
    checked = hadolint(tmp_path / "out" / "Dockerfile")
    assert checked.returncode == 0, checked.stdout
    objects = documents(tmp_path / "out")
    assert list(objects) == ["Deployment", "Service", "PodDisruptionBudget"]
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert "persistentVolumeClaim" not in str(pod["volumes"])
    assert objects["Deployment"]["spec"]["replicas"] == 1
    assert pod["containers"][0]["image"] == deployment.image


def test_kserve_s_predictor_is_a_pod(demo_bundle, tmp_path):
    write_manifests(demo_bundle, tmp_path / "out", kserve=True, replicas=(1, 3))
    (service,) = documents(tmp_path / "out").values()
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert list(service["spec"]) == ["predictor"]
    predictor = dict(service["spec"]["predictor"])
    assert [predictor.pop(key) for key in KSERVE_ONLY] == [1, 3]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": predictor}
    kubernetes_validate.validate(pod, VERSIONS[0], strict=True)
    assert predictor["containers"][0]["name"] == "kserve-container"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Not_A_Name"}, "Not_A_Name"),
        ({"name": "a" * 54}, "at most 53"),
        ({"replicas": (3, 2)}, "3:2"),
        ({"replicas": (0, 2)}, "--replicas is 0"),
        ({"cpus": 0}, "--cpus is 0"),
        ({"kv_memory": 1024}, "does not hold one slot"),
        ({"max_len": 99999}, "2048 positions"),
    ],
)
def test_what_cannot_be_is_refused(demo_bundle, options, said):
    with pytest.raises(BadInput, match=said):
        plan_deployment(open_bundle(demo_bundle), **options)


def test_the_command(demo_bundle, tmp_path):
    out = tmp_path / "out"
    command = ["deploy", "kubernetes", str(demo_bundle), str(out), "--replicas"]
    done = CliRunner().invoke(app, [*command, "1:4"])
    assert done.exit_code == 0 and "MiB a pod" in done.stdout, done.output
    assert "HorizontalPodAutoscaler" in documents(out)
    assert isinstance(CliRunner().invoke(app, [*command, "2"]).exception, BundleError)
    assert CliRunner().invoke(app, [*command, "2", "--force"]).exit_code == 0
    assert documents(out)["Deployment"]["spec"]["replicas"] == 2
    assert isinstance(CliRunner().invoke(app, [*command, "few"]).exception, BadInput)


def test_the_package_s_own_dockerfile_is_clean():
    checked = hadolint(ROOT / "Dockerfile")
    assert checked.returncode == 0, checked.stdout


def test_an_image_s_requirements():
    found = requirements(["cpu", "serve"])
    names = {line.split("<")[0].split(">")[0].split("=")[0] for line in found}
    assert {"onnxruntime", "tokenizers", "fastapi", "uvicorn"} <= names
    assert not {"torch", "transformers", "pytest"} & names
    with pytest.raises(BadInput, match="extra 'none'"):
        requirements(["none"])
