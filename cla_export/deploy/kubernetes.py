"""deploy kubernetes: what a cluster needs to run `cla-export serve` on a bundle.

Plain data, in Kubernetes' own terms; `write_manifests` makes files of it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cla_export
from cla_export.bundle import MANIFEST, Bundle, new_folder, open_bundle, sha256
from cla_export.deploy.host_memory import memory_to_serve
from cla_export.deploy.replicas import Replicas
from cla_export.engines.opening import backend_of
from cla_export.errors import BadInput
from cla_export.serve.pool import PoolSize, pool_of

Json = dict[str, Any]

_BASE = f"cla-export:{cla_export.__version__}"
MANIFESTS = "kubernetes.yaml"
DOCKERFILE = "Dockerfile"
_PORT = 8000
_USER = 10001  # of the image
_KEYS = "/etc/cla-export/keys"  # a file of the secret
_PRE_STOP = 10  # seconds until no endpoint sends requests any more
_MARGIN = 15  # seconds between the drain's end and the kill
_LOAD = 600  # seconds that opening a bundle may take: every byte is hashed
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?")  # room for a suffix in 63 characters


@dataclass(frozen=True, slots=True)
class Deployment:
    """How a bundle runs on a cluster. Sizes in bytes, times in seconds."""

    name: str
    image: str
    replicas: Replicas
    cpus: int
    claim: str | None  # volume claim that has the bundle; None: the image has it
    drain: int  # that requests may take to finish
    max_len: int | None
    served_name: str
    pool: PoolSize
    memory: int

    @property
    def keys_secret(self) -> str:
        """The secret whose entry `keys` is the API keys, one a line."""
        return f"{self.name}-keys"


def plan_deployment(
    bundle: Bundle,
    *,
    image: str | None = None,
    name: str | None = None,
    replicas: tuple[int, int] = (1, 1),
    cpus: int = 4,
    claim: str | None = None,
    slots: int | None = None,
    kv_memory: int | None = None,
    max_len: int | None = None,
    drain: int = 60,
) -> Deployment:
    """How a bundle is to run, with the memory that it takes.

    Args:
        bundle: what is served, on CPUs.
        image: that runs; None: this version's, as `docker build` of its Dockerfile is called.
        name: of all objects; None: made of the bundle folder's.
        replicas: pods at least and at most; where they differ, an autoscaler is written.
        cpus: cores of a pod, and threads of its engine.
        claim: PersistentVolumeClaim with the bundle at its root; None: it is in the image.
        slots: sequences that run side by side; None: what `kv_memory` holds, or the default.
        kv_memory: bytes for KV caches, in place of `slots`.
        max_len: tokens of prompt and answer; None: all of the model's positions.
        drain: seconds that running requests have once a pod is to go.

    Raises:
        BadInput: a value is none that Kubernetes or the bundle takes.
    """
    backend = backend_of(bundle)
    if backend != "onnxruntime" or bundle.dtype != "float32":
        raise BadInput(
            f"{bundle.folder}: {bundle.dtype} for {bundle.target}; the image has ONNX Runtime for "
            "CPUs, which serves float32: export with --target onnxruntime --dtype fp32"
        )
    folder = bundle.folder.resolve().name
    name = name or re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name!r} is no name for objects of Kubernetes; expected at most 53 of a-z, 0-9 and "
            "`-`, a letter first: give one with --name"
        )
    replicas = Replicas(*replicas).checked()
    numbers = {"--cpus": cpus, "--shutdown-timeout": drain}
    for option, number in numbers.items():
        if number < 1:
            raise BadInput(f"{option} is {number}; expected at least 1")
    pool = pool_of(bundle, backend, max_len, slots, kv_memory)
    # With the bundle's own digest, another bundle is another image, which a cluster rolls out.
    default = _BASE if claim else f"{name}:{sha256(bundle.folder / MANIFEST)[:12]}"
    return Deployment(
        name=name,
        image=image or default,
        replicas=replicas,
        cpus=cpus,
        claim=claim,
        drain=drain,
        max_len=max_len,
        served_name=folder,
        pool=pool,
        memory=memory_to_serve(bundle, pool),
    )


def manifests(deployment: Deployment) -> list[Json]:
    """Deployment, Service, PodDisruptionBudget and, where pods may be more, an autoscaler."""
    least, most = deployment.replicas
    labels = {"app.kubernetes.io/name": deployment.name}
    selector = {"matchLabels": labels}

    def made(version: str, kind: str, spec: Json) -> Json:
        metadata = {"name": deployment.name, "labels": labels}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}

    found = [
        made(
            "apps/v1",
            "Deployment",
            {
                **({"replicas": least} if most == least else {}),  # else the autoscaler's
                "selector": selector,
                "strategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
                },
                "template": {"metadata": {"labels": labels}, "spec": pod_spec(deployment)},
            },
        ),
        made(
            "v1",
            "Service",
            {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        ),
        made("policy/v1", "PodDisruptionBudget", {"maxUnavailable": 1, "selector": selector}),
    ]
    if most > least:
        found.append(made("autoscaling/v2", "HorizontalPodAutoscaler", _autoscaler(deployment)))
    return found


def inference_service(deployment: Deployment) -> Json:
    """KServe's object for the same pods: a custom container that speaks OpenAI's API."""
    least, most = deployment.replicas
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": deployment.name,
            # Knative lets no pod have a preStop hook, or time to drain.
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
        },
        "spec": {
            "predictor": {
                "minReplicas": least,
                "maxReplicas": most,
                **pod_spec(deployment, container="kserve-container"),
            }
        },
    }


def pod_spec(deployment: Deployment, container: str = "serve") -> Json:
    """A pod: one engine, that nobody can write to but for /tmp."""
    volumes: list[Json] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": "keys", "secret": {"secretName": deployment.keys_secret}},
    ]
    mounts: list[Json] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "keys", "mountPath": str(Path(_KEYS).parent), "readOnly": True},
    ]
    if deployment.claim is not None:
        claim = {"claimName": deployment.claim, "readOnly": True}
        volumes.append({"name": "bundle", "persistentVolumeClaim": claim})
        mounts.append({"name": "bundle", "mountPath": "/bundle", "readOnly": True})
    memory = f"{-(-deployment.memory // 2**20)}Mi"
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _PRE_STOP + deployment.drain + _MARGIN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": deployment.image,
                "args": arguments(deployment),
                "ports": [{"name": "http", "containerPort": _PORT}],
                "resources": {
                    "requests": {"cpu": str(deployment.cpus), "memory": memory},
                    "limits": {"memory": memory},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "startupProbe": _probe("/ready", period=5, failures=_LOAD // 5),
                "readinessProbe": _probe("/ready", period=5, failures=2),
                "livenessProbe": _probe("/health", period=10, failures=3),
                # Until every proxy knows that the pod goes; only then SIGTERM, which drains.
                "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_PRE_STOP)]}}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def arguments(deployment: Deployment) -> list[str]:
    """Of `cla-export serve`, behind those that the image's entry point has."""
    wanted: dict[str, object | None] = {
        "--served-model-name": deployment.served_name,
        "--slots": deployment.pool.slots,
        "--max-len": deployment.max_len,
        "--threads": deployment.cpus,
        "--api-key-file": _KEYS,
        "--shutdown-timeout": deployment.drain,
    }
    return [f"{option}={value}" for option, value in wanted.items() if value is not None]


def _probe(path: str, *, period: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 5,
    }


def _autoscaler(deployment: Deployment) -> Json:
    """By requests that run, since one alone keeps all cores busy: more pods at 3/4 of the slots."""
    least, most = deployment.replicas
    target = max(1, deployment.pool.slots * 3 // 4)
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment.name},
        "minReplicas": least,
        "maxReplicas": most,
        "metrics": [
            {
                "type": "Pods",
                "pods": {
                    "metric": {"name": "cla_export_num_requests_running"},
                    "target": {"type": "AverageValue", "averageValue": str(target)},
                },
            }
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
    }


def dockerfile(deployment: Deployment, bundle: Path, file: Path) -> str:
    """An image that has the bundle, which is the build's context."""
    return (
        "# Written by `cla-export deploy kubernetes`. Build it, and push it where the cluster is:\n"
        f"#   docker build -f {file} -t {deployment.image} {bundle}\n"
        f"# {_BASE} is what `docker build -t {_BASE} .` makes in a clone of cla-export.\n"
        f"FROM {_BASE}\n"
        "COPY . /bundle\n"
    )


def write_manifests(
    folder: Path | str,
    out: Path | str,
    *,
    kserve: bool = False,
    force: bool = False,
    **options: Any,  # noqa: ANN401
) -> Deployment:
    """Write the objects for a bundle, and a Dockerfile for an image with it, into a new folder.

    Args:
        folder: the bundle (verified).
        out: the new folder; `kubectl apply -f` takes the file MANIFESTS in it.
        kserve: write an InferenceService in place of Kubernetes' own objects.
        force: replace an earlier one.
        **options: as for `plan_deployment`.

    Raises:
        BadInput: as `plan_deployment` does.
        BundleError: no intact bundle; the folder exists and `force` is false.
    """
    bundle = open_bundle(folder)
    deployment = plan_deployment(bundle, **options)
    objects = [inference_service(deployment)] if kserve else manifests(deployment)
    with new_folder(Path(out), force=force, needed_bytes=0, manifest=MANIFESTS) as partial:
        (partial / MANIFESTS).write_text(as_yaml(deployment, objects), encoding="utf-8")
        if deployment.claim is None:
            file = Path(out).absolute() / DOCKERFILE
            text = dockerfile(deployment, bundle.folder.resolve(), file)
            (partial / DOCKERFILE).write_text(text, encoding="utf-8")
    return deployment


def as_yaml(deployment: Deployment, objects: Sequence[Json]) -> str:
    """The objects as YAML, one document each, with what has to be there before them."""
    import yaml

    head = (
        "# Written by `cla-export deploy kubernetes`. Clients send a key of this secret:\n"
        f"#   kubectl create secret generic {deployment.keys_secret} "
        '--from-literal=keys="$(openssl rand -hex 32)"\n'
    )
    if any(one["kind"] == "HorizontalPodAutoscaler" for one in objects):
        head += (
            "# The autoscaler reads cla_export_num_requests_running: it needs an adapter for\n"
            "# custom metrics (prometheus-adapter, say), and a scrape of /metrics with a key.\n"
        )
    apart = [json.loads(json.dumps(one)) for one in objects]  # what occurs twice is written twice
    documents = [yaml.safe_dump(one, sort_keys=False, width=100) for one in apart]
    return head + "---\n".join(documents)
