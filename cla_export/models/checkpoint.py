"""A model folder: config.json, model.safetensors, tokenizer.json, generation_config.json.

`open_checkpoint` checks all of it against the config before anybody computes with it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.errors import BadInput
from cla_export.layout import KVLayout
from cla_export.models import Family, family_of
from cla_export.models.agreement import check_weights, tied_names
from cla_export.models.assembly import assemble
from cla_export.models.safetensors_index import TensorEntry, read_index
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from cla_export.models.decoder import Decoder


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose config and weights agree."""

    folder: Path
    config: Mapping[str, object]
    spec: ModelSpec
    tensors: Mapping[str, TensorEntry]
    family: Family
    notes: tuple[str, ...] = ()  # what is fine, and worth saying
    module: str | None = None  # package.module:factory, where the user named one

    @property
    def dtype(self) -> str:
        """The dtype that most weight bytes are stored in: float32, float16 or bfloat16."""
        sizes = self.weight_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights by the dtype that they are stored in."""
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            name = _DTYPES[entry.dtype]
            sizes[name] = sizes.get(name, 0) + entry.nbytes
        return sizes


def read_config(folder: Path) -> dict[str, object]:
    """Parse a folder's config.json; refuse what is not a model folder."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise BadInput(f"{folder}: {kind}; expected a model folder with a config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: not a model folder, it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def open_checkpoint(
    folder: Path, module: str | None = None, layout: KVLayout | None = None
) -> Checkpoint:
    """Open a model folder, checking every weight's name, shape, dtype and presence.

    Args:
        folder: the model folder.
        module: `package.module:factory` that makes its PyTorch module, in place of a family that
            config.json names. It is imported.
        layout: such a module's KV layout, where it is known; None: config.json or its graph says.

    Raises:
        BadInput: something is missing or does not fit; all tensors that do not are listed.
    """
    config = read_config(folder)
    family = _family_of(config, module, layout)
    spec = family.read_spec(config)
    index = read_index(folder)
    tensors = dict(index)
    renamed = spec.renamed or {}
    if sum(n in tensors for n in renamed.values()) > sum(n in tensors for n in renamed):
        moved = {name: tensors[n] for name, n in renamed.items() if n in tensors}
        rest = {name: entry for name, entry in tensors.items() if name not in renamed.values()}
        tensors = {**rest, **moved}
    for other, name in tied_names(spec).items():
        if name not in tensors and other in tensors:
            tensors[name] = tensors.pop(other)
    tensors, problems = assemble(spec, tensors, index)
    notes = check_weights(folder, spec, tensors, problems)
    kept = {name: tensors[name] for name in spec.weights()}
    return Checkpoint(folder, config, spec, kept, family, tuple(notes), module)


def _family_of(config: Mapping[str, object], module: str | None, layout: KVLayout | None) -> Family:
    if module is None:
        return family_of(config)
    from cla_export.models.module import ModuleFamily

    return ModuleFamily.named(module, layout)


def load_model(checkpoint: Checkpoint, dtype: "torch.dtype | None" = None) -> "Decoder":
    """Build the checkpoint's module with its weights, in evaluation mode.

    `dtype` None means float32, to which every checkpoint dtype converts exactly.
    """
    import numpy as np
    import torch

    dtype = dtype or torch.float32
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    model = checkpoint.family.build(checkpoint.spec)
    parameters = dict(model.named_parameters())
    held = {**parameters, **dict(model.named_buffers())}
    with torch.no_grad():
        for name, entry in checkpoint.tensors.items():
            flat, start = held[name].view(-1), 0
            for place in entry.places:
                read = np.fromfile(place.path, np.uint8, place.nbytes, offset=place.offset)
                values = torch.from_numpy(read).view(stored[place.dtype])
                flat[start : start + len(values)] = values
                start += len(values)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def save_checkpoint(
    model: "Decoder",
    folder: Path,
    config: Mapping[str, object],
    *,
    generation_config: Mapping[str, object] | None = None,
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write an ordinary model folder: config.json, generation_config.json, model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config or {}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    parameters = {  # a tied head appears once
        name: parameter.detach().to(dtype or parameter.dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
