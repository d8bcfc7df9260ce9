"""A plan as a Serve config: for `serve deploy` on a cluster, and for KubeRay's `serveConfigV2`."""

from pathlib import Path
from typing import Any

from cla_export.deploy.ray_affinity import CALLBACK
from cla_export.deploy.ray_plan import RayPlan
from cla_export.errors import BadInput

QUIET = {"log_level": "WARNING", "enable_access_log": False}  # prompts stay out of logs
_HEAD = """\
# {name} on Ray Serve, by cla-export deploy ray. Every machine needs the bundle and the files that
# args name, by these paths, and `pip install 'cla-export[ray,...]'` with what runs the bundle.
"""
_AFFINITY = """\
# Requests find the replica that knows the beginning of their prompt if Ray is started, on every
# machine, with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH={callback}
# (or if clients send x-session-id).
"""


def config(plan: RayPlan) -> dict[str, Any]:
    """The config, as plain data."""
    return {
        "proxy_location": "EveryNode",
        "http_options": plan.http(),
        "logging_config": QUIET,
        "applications": [
            {
                "name": plan.application,
                "route_prefix": "/",
                "import_path": "cla_export.deploy.ray:app",
                "args": plan.options.replica.to_json(),
                "deployments": [plan.deployment()],
            }
        ],
    }


def write(plan: RayPlan, file: Path) -> None:
    """Write it as YAML, checked against the schema of the Ray that is installed.

    BadInput where it cannot be written, or leaves open which port to listen on.
    """
    import yaml
    from ray.serve.schema import ServeDeploySchema

    if not plan.options.port:
        raise BadInput("--port 0 leaves the port open; a Serve config needs one, such as 8000")
    content = config(plan)
    ServeDeploySchema.model_validate(content)
    head = _HEAD.format(name=plan.name)
    if plan.options.affinity == "prefix":
        head += _AFFINITY.format(callback=CALLBACK)
    try:
        file.write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{file}: cannot be written ({error.strerror})") from error
