"""A model folder: config.json, model.safetensors, tokenizer.json, generation_config.json.

`open_checkpoint` checks all of it against the config before anybody computes with it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.errors import BadInput
from cla_export.models import family_of
from cla_export.models.safetensors_index import TensorEntry, read_index
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from cla_export.models.decoder import Decoder

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose config and weights agree."""

    folder: Path
    config: Mapping[str, object]
    spec: ModelSpec
    tensors: Mapping[str, TensorEntry]

    @property
    def dtype(self) -> str:
        """The dtype that most weight bytes are stored in: float32, float16 or bfloat16."""
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return names[max(sizes, key=lambda dtype: sizes[dtype])]


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


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder, checking every weight's name, shape, dtype and presence."""
    config = read_config(folder)
    spec = family_of(config).read_spec(config)
    tensors = index = read_index(folder)
    renamed = spec.renamed or {}
    if sum(n in tensors for n in renamed.values()) > sum(n in tensors for n in renamed):
        moved = {name: tensors[n] for name, n in renamed.items() if n in tensors}
        rest = {name: entry for name, entry in tensors.items() if name not in renamed.values()}
        tensors = {**rest, **moved}
    tensors = _assembled(folder, spec, tensors, index)
    _check_weights(folder, spec, tensors)
    return Checkpoint(folder, config, spec, {name: tensors[name] for name in spec.weights()})


def _assembled(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, TensorEntry],
    index: Mapping[str, TensorEntry],
) -> dict[str, TensorEntry]:
    """`tensors`, where parameters that the checkpoint has in pieces stand for their pieces."""
    made, used = {}, set()
    for name, ways in (spec.assembled or {}).items():
        rows = max(ways, key=lambda way: sum(part.name in index for part in way) / len(way))
        for part in rows:
            if part.name not in index:
                raise BadInput(f"{folder}: weight {part.name} is missing; {_hint(part.name, spec)}")
            _check_shape(folder, part.name, index[part.name], part.shape)
        parts = [index[r.name].rows(r.start, r.stop or r.shape[0]) for r in rows]
        if len({part.dtype for part in parts}) > 1:
            raise BadInput(
                f"{folder}: {parts[0].name} is {parts[0].dtype} and others that make up {name} are "
                "not; save them in one dtype"
            )
        first, size = parts[0], sum(part.nbytes for part in parts)
        made[name] = replace(
            first,
            shape=spec.weights()[name],
            nbytes=size,
            parts=() if len(parts) == 1 else tuple(parts),
        )
        used |= {row.name for row in rows}
    return {**{n: entry for n, entry in tensors.items() if n not in used}, **made}


def _check_shape(folder: Path, name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise BadInput(
            f"{folder}: weight {name} has shape {list(entry.shape)}, config.json says "
            f"{list(shape)}; one of the two belongs to another model"
        )


def _check_weights(folder: Path, spec: ModelSpec, tensors: Mapping[str, TensorEntry]) -> None:
    expected = spec.weights()
    for name, shape in expected.items():
        if name not in tensors:
            raise BadInput(f"{folder}: weight {name} is missing; {_hint(name, spec)}")
        entry = tensors[name]
        _check_shape(folder, name, entry, shape)
        if entry.dtype not in _FLOATS:
            raise BadInput(
                f"{folder}: weight {name} is {entry.dtype}; expected one of {', '.join(_FLOATS)}"
            )
    for name in tensors:
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and spec.tie_embeddings:
            _check_tied_copy(folder, spec, tensors)
            continue
        if spec.part and not name.startswith(spec.part):
            continue  # another model's
        raise BadInput(f"{folder}: unexpected weight {name}; {_hint(name, spec)}")


def _hint(name: str, spec: ModelSpec) -> str:
    parts = name.split(".")
    if len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit():
        layer = int(parts[2])
        if layer >= spec.num_layers:
            return f"config.json has num_hidden_layers {spec.num_layers}"
        owner = spec.layout.kv_owner[layer]
        if any(part in parts for part in ("k_proj", "v_proj", "k_norm", "kv_layernorm")):
            role = "is an owner" if owner == layer else f"is a sharer of layer {owner}"
            options = f"separate_kv_norm {spec.separate_kv_norm}, qk_norm {spec.qk_norm}"
            return (
                f"by config.json's KV layout layer {layer} {role} ({options}): "
                "correct kv_owner or those options"
            )
    if name == "lm_head.weight":
        return "config.json says tie_word_embeddings false; set it to true if the head is tied"
    return "config.json describes another model than these weights (or lacks an option)"


def _check_tied_copy(folder: Path, spec: ModelSpec, tensors: Mapping[str, TensorEntry]) -> None:
    table = spec.vocab_size, spec.hidden_size
    embedding = next(name for name, shape in spec.weights().items() if shape == table)
    copies = []
    for name in (embedding, "lm_head.weight"):
        entry = tensors[name]
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            copies.append(file.read(entry.nbytes))
    if copies[0] != copies[1]:
        raise BadInput(
            f"{folder}: config.json says tie_word_embeddings true, but lm_head.weight differs from "
            f"{embedding}; set tie_word_embeddings to false"
        )


def load_model(checkpoint: Checkpoint, dtype: "torch.dtype | None" = None) -> "Decoder":
    """Build the checkpoint's module with its weights, in evaluation mode.

    `dtype` None means float32, to which every checkpoint dtype converts exactly.
    """
    import numpy as np
    import torch

    dtype = dtype or torch.float32
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    model = family_of(checkpoint.config).build(checkpoint.spec)
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
