"""Parameters that a checkpoint has in pieces: experts one by one, q, k and v in one tensor."""

from collections.abc import Mapping
from dataclasses import replace

from cla_export.models.agreement import Problem, misshapen, missing
from cla_export.models.safetensors_index import TensorEntry
from cla_export.spec import ModelSpec

Entries = Mapping[str, TensorEntry]


def assemble(
    spec: ModelSpec, tensors: Entries, index: Entries
) -> tuple[dict[str, TensorEntry], dict[str, list[Problem]]]:
    """`tensors` with each parameter in place of its pieces, which `index` has by their own names.

    Where a parameter can be made up in several ways, the one counts that most is there of. Returns
    what is wrong with the pieces as well, by parameter.
    """
    made: dict[str, TensorEntry] = {}
    used: set[str] = set()
    problems: dict[str, list[Problem]] = {}
    for name, ways in (spec.assembled or {}).items():
        rows = max(ways, key=lambda way: sum(part.name in index for part in way) / len(way))
        used |= {row.name for row in rows}
        wrong = [missing(row.name, spec) for row in rows if row.name not in index]
        wrong += [
            misshapen(row.name, index[row.name], row.shape)
            for row in rows
            if row.name in index and index[row.name].shape != row.shape
        ]
        if wrong:
            problems[name] = wrong
            continue
        parts = [index[row.name].rows(row.start, row.stop or row.shape[0]) for row in rows]
        if len({part.dtype for part in parts}) > 1:
            what = f"weight {{}} is {parts[0].dtype}, and others that make up {name} are not"
            problems[name] = [Problem(what, parts[0].name, "save them in one dtype")]
            continue
        made[name] = replace(
            parts[0],
            shape=spec.weights()[name],
            nbytes=sum(part.nbytes for part in parts),
            parts=() if len(parts) == 1 else tuple(parts),
        )
    return {**{n: entry for n, entry in tensors.items() if n not in used}, **made}, problems
