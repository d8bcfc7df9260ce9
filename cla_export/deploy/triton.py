"""deploy triton: a bundle as a model of a Triton model repository.

REPOSITORY/NAME/config.pbtxt    tensors, and parameters for the engine
REPOSITORY/NAME/1/model.py      imports what serves it from this package
REPOSITORY/NAME/1/bundle/       the bundle, where it is copied
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cla_export.bundle import Bundle, new_folder, open_bundle
from cla_export.deploy.triton_config import CONFIG, Parameters, config_text
from cla_export.engines.opening import backend_of
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.errors import BadInput
from cla_export.serve.pool import pool_of
from cla_export.serve.server import check_options

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = "1"
_COPY = Path("bundle")  # in the version's folder
_MODEL = '''\
"""Written by `cla-export deploy triton`. Needs cla-export[cpu,serve] in Triton's Python."""

from cla_export.deploy.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, slots=True)
class TritonModel:
    """A model that was written into a repository, and the bundle that it serves."""

    folder: Path
    bundle: Path


def write_model(
    repository: Path | str,
    parameters: Parameters,
    *,
    name: str | None = None,
    copy: bool = False,
    force: bool = False,
) -> TritonModel:
    """Write a bundle's model into a repository, which is made if it is not there.

    Args:
        repository: what `tritonserver --model-repository` is given; other models stay as they are.
        parameters: the bundle (verified), and how it is served; paths as seen from here.
        name: of the model; None: the bundle's folder's.
        copy: put the bundle into the repository, which then can move; else its path is written.
        force: replace a model of that name.

    Raises:
        BadInput: a parameter does not fit the bundle, or the name is none for Triton.
        BundleError: no intact bundle; the model exists and `force` is false; no room.
    """
    bundle = open_bundle(parameters.bundle)
    place = bundle.folder.resolve()
    name = name or place.name
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{name!r} is no name for a model of Triton; expected letters, digits, `_`, `-` and "
            "`.`: give one with --name"
        )
    _check(bundle, parameters)
    engine = None if parameters.engine is None else Path(parameters.engine).resolve()
    if copy and engine is not None and not engine.is_relative_to(place):
        raise BadInput(f"{engine} is not in {place}; --copy takes the bundle's own engines")
    folder = Path(repository).absolute() / name
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    with new_folder(
        folder, force=force, needed_bytes=size if copy else 0, manifest=CONFIG
    ) as partial:
        version = partial / _VERSION
        version.mkdir()
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        if copy:
            shutil.copytree(place, version / _COPY)
            engine = None if engine is None else _COPY / engine.relative_to(place)
        paths = {
            "bundle": str(_COPY if copy else place),
            "engine": None if engine is None else str(engine),
        }
        text = config_text(parameters.model_copy(update=paths))
        (partial / CONFIG).write_text(text, encoding="utf-8")
    return TritonModel(folder, folder / _VERSION / _COPY if copy else place)


def _check(bundle: Bundle, parameters: Parameters) -> None:
    """Refuse now what the model would refuse when Triton loads it."""
    options = parameters.to_options(Path())
    check_options(options)
    backend = backend_of(bundle, options.backend)
    if backend not in FLAVOURS:
        pool_of(bundle, backend, options.max_len, options.slots, options.kv_memory)
    elif options.kv_memory is not None:
        raise BadInput("--kv-memory does not fit an engine, whose pool is what it was built for")
