"""What a Serve config names: `import_path: cla_export.deploy.ray:app`."""

from collections.abc import Mapping
from typing import Any

from ray import serve

from cla_export.deploy.ray_args import ReplicaArgs
from cla_export.deploy.ray_plan import DEPLOYMENT
from cla_export.deploy.ray_replica import Replica


def app(args: dict[str, Any]) -> serve.Application:
    """The application that Ray Serve runs; `args` as `ReplicaArgs`, BadInput for any other."""
    return bind(args, {})


def bind(args: dict[str, Any], deployment: Mapping[str, Any]) -> serve.Application:
    """The same, with options of the deployment, which a Serve config has in `deployments`."""
    options = {"name": DEPLOYMENT, **deployment}
    return serve.deployment(**options)(Replica).bind(ReplicaArgs.read(args).to_json())
