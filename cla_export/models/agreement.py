"""Whether a checkpoint's tensors are those that its model needs: all that is wrong, at once.

| found | so |
|---|---|
| missing, of another shape, of a dtype that is not read | refused |
| another name for a tied weight | fine if its bytes are equal, refused if not |
| several float dtypes | fine, and said |
| tables and masks that modules keep beside their weights, weights of another part | ignored |
| anything else | refused: the config describes another model |
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cla_export.errors import BadInput
from cla_export.models.safetensors_index import TensorEntry
from cla_export.spec import ModelSpec

FLOATS = ("F32", "F16", "BF16")
_SHOWN = 8  # names of a kind
_BLOCK = 1 << 24  # bytes compared at a time
_COMPUTED = re.compile(
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$|attn\.masked_bias$"
)
_MASK = re.compile(r"attn\.bias$")  # of GPT-2's age: [1, 1, T, T]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one tensor, and what to do."""

    what: str  # with {} in place of the tensor's name
    name: str
    advice: str


def check_weights(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, TensorEntry],
    in_pieces: Mapping[str, list[Problem]],
) -> list[str]:
    """Compare stored tensors with the weights that a spec names; what is fine but worth saying.

    `in_pieces` is what is wrong with the pieces of weights that are not in one.

    Raises:
        BadInput: all that is wrong, with what is ignored beside it.
    """
    expected = {n: shape for n, shape in spec.weights().items() if n not in in_pieces}
    ignored = [n for n in tensors if n not in expected and _is_ignored(n, tensors[n], spec)]
    problems = [problem for found in in_pieces.values() for problem in found]
    problems += _problems(spec, expected, tensors, set(ignored))
    notes = [f"ignored, since no weights of this model: {_some(ignored)}"] if ignored else []
    if problems:
        raise BadInput(_message(folder, problems, notes))
    kinds = Counter(tensors[name].dtype for name in expected)
    if len(kinds) > 1:
        counts = " and ".join(f"{kind} ({count} tensors)" for kind, count in kinds.most_common())
        notes.append(f"weights are stored as {counts}; each is converted from its own")
    return notes


def _problems(
    spec: ModelSpec,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorEntry],
    ignored: set[str],
) -> Iterator[Problem]:
    for name in expected:
        if name not in tensors:
            yield missing(name, spec)
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            yield misshapen(name, tensors[name], shape)
    for name in expected:
        if name in tensors and tensors[name].dtype not in FLOATS:
            yield Problem(
                f"weight {{}} is {tensors[name].dtype}",
                name,
                f"expected one of {', '.join(FLOATS)}; weights that are quantised already are not "
                "read: take the checkpoint that they were made from",
            )
    copies = tied_names(spec)
    for name in tensors:
        if name in expected or name in ignored:
            continue
        if name not in copies:
            yield Problem("unexpected weight {}", name, _hint(name, spec))
        elif copies[name] in tensors and not _same(tensors[name], tensors[copies[name]]):
            advice = f"remove {name}, or make the model untie it"
            if spec.tie_embeddings:
                advice = "config.json says tie_word_embeddings true: set it to false"
            yield Problem(f"tied weight {{}} differs from {copies[name]}", name, advice)


def missing(name: str, spec: ModelSpec) -> Problem:
    """A tensor that is not there."""
    return Problem("weight {} is missing", name, _hint(name, spec))


def misshapen(name: str, entry: TensorEntry, shape: tuple[int, ...]) -> Problem:
    """A tensor of another shape."""
    what = f"weight {{}} has shape {list(entry.shape)}, config.json says {list(shape)}"
    return Problem(what, name, "one of the two belongs to another model")


def tied_names(spec: ModelSpec) -> dict[str, str]:
    """Further names that a checkpoint may have for a weight -> the weight's own."""
    names = dict(spec.tied or {})
    if spec.tie_embeddings:
        table = spec.vocab_size, spec.hidden_size
        embedding = next((name for name, shape in spec.weights().items() if shape == table), None)
        if embedding is not None:
            names.setdefault("lm_head.weight", embedding)
    return names


def _is_ignored(name: str, entry: TensorEntry, spec: ModelSpec) -> bool:
    if name in tied_names(spec):
        return False
    mask = _MASK.search(name) is not None and len(entry.shape) == 4
    another = bool(spec.part) and not name.startswith(spec.part)
    return mask or another or _COMPUTED.search(name) is not None


def _same(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, _BLOCK):
            count = min(_BLOCK, one.nbytes - start)
            if first.read(count) != second.read(count):
                return False
    return True


def _message(folder: Path, problems: list[Problem], notes: list[str]) -> str:
    if len(problems) == 1 and not notes:
        (only,) = problems
        return f"{folder}: {only.what.format(only.name)}; {only.advice}"
    lines = [f"{folder}: {len(problems)} of its tensors are not what config.json describes"]
    by_advice: dict[str, list[Problem]] = {}
    for problem in problems:
        by_advice.setdefault(problem.advice, []).append(problem)
    for advice, alike in by_advice.items():
        lines += [f"  {p.what.format(p.name)}" for p in alike[:_SHOWN]]
        if len(alike) > _SHOWN:
            lines.append(f"  and {len(alike) - _SHOWN} more like these")
        lines.append(f"    {advice}")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _hint(name: str, spec: ModelSpec) -> str:
    if spec.tied is not None:
        return (
            "the module's parameters and persistent buffers, and the checkpoint's tensors, must "
            "have the same names"
        )
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
