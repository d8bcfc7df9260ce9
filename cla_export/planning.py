"""Plan: what fits in a given memory, for a model's own KV layout and for others it could have.

Memory, batch and context only; nothing here is about speed.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil
from pathlib import Path

from cla_export.errors import BadInput, LayoutError
from cla_export.inspection import read_model_spec
from cla_export.layout import (
    DTYPE_BITS,
    KVLayout,
    Remainder,
    dense_back,
    dense_front,
    identity,
    keep_ends,
    one_owner,
    uniform,
)
from cla_export.models.checkpoint import read_config
from cla_export.spec import ModelSpec

RESERVE = 0.05  # of the memory, for activations and the runtime
_UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One layout in the memory of the plan. Sizes in bytes, contexts in tokens."""

    name: str
    own: bool  # the model's own layout
    layout: KVLayout
    parameters: int
    weight_bytes: int
    bytes_per_token: int
    bytes_per_slot: int  # at the plan's context
    cache_budget: int  # what is left for caches after reserve and weights; negative: none
    slots: int  # at the plan's context
    largest_context: (
        int  # at the plan's batch, as memory allows; the model's positions may be fewer
    )
    fits: bool
    reason: str  # why it does not fit; empty if it does


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits: the model's own layout first, then the others by falling cache size."""

    name: str
    memory: int  # bytes
    reserve: float  # fraction of memory kept free
    context: int  # tokens per slot
    batch: int | None  # slots wanted; None asks for one
    dtype: str  # of the caches
    weights_dtype: str
    max_positions: int
    rows: tuple[PlanRow, ...]
    skipped: tuple[tuple[str, str], ...]  # layouts that this model cannot have, and why
    notes: tuple[str, ...]

    @property
    def own(self) -> PlanRow:
        """The model's own layout."""
        return next(row for row in self.rows if row.own)

    @property
    def reserve_bytes(self) -> int:
        """Memory kept free for activations and the runtime."""
        return _reserved(self.memory, self.reserve)

    def to_json(self) -> dict[str, object]:
        """Plain data; each row's `layout` reads back with `KVLayout.from_json`."""
        return {
            "name": self.name,
            "memory": self.memory,
            "reserve": self.reserve,
            "reserve_bytes": self.reserve_bytes,
            "context": self.context,
            "batch": self.batch,
            "dtype": self.dtype,
            "weights_dtype": self.weights_dtype,
            "max_positions": self.max_positions,
            "rows": [
                {**asdict(row), "layout": row.layout.to_json(), "groups": row.layout.num_groups}
                for row in self.rows
            ],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "notes": list(self.notes),
        }


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as `16GiB` (1024-based), `8GB` (1000-based), `512MiB`, or a number.

    BadInput for anything else; `16G` is refused because it means both.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        found = Fraction(size)
    else:
        match = _SIZE.fullmatch(str(size).strip())
        unit = match[2] if match else ""
        if match is None or (unit and unit.lower() not in {name.lower() for name in _UNITS}):
            both = ""
            if match and unit.upper() in ("K", "M", "G", "T"):
                both = f"; {unit} alone is ambiguous: say {unit.upper()}iB or {unit.upper()}B"
            raise BadInput(
                f"memory size is {size!r}; expected a number with a unit, such as 16GiB "
                f"(1024-based), 8GB (1000-based) or 512MiB{both}"
            )
        factors = {name.lower(): factor for name, factor in _UNITS.items()}
        found = Fraction(match[1]) * factors[unit.lower() or "b"]
    if found < 1:
        raise BadInput(f"memory size is {size!r}; expected at least one byte")
    return int(found)


def plan(
    spec_or_path: ModelSpec | Path | str,
    memory: int | str,
    context: int,
    batch: int | None = None,
    dtype: str = "fp16",
    *,
    weights_dtype: str | None = None,
    reserve: float = RESERVE,
    name: str | None = None,
) -> Plan:
    """Plan a model in `memory` bytes (or `16GiB`) with slots of `context` tokens.

    `spec_or_path` is a ModelSpec, a folder with a config.json, or that file. `dtype` is that of the
    caches and, unless `weights_dtype` says otherwise, of the weights. `batch` is the slots wanted;
    without it one is, and `largest_context` is that of one slot. Raises BadInput.
    """
    spec, folder = _spec_of(spec_or_path)
    memory = parse_bytes(memory)
    weights_dtype = weights_dtype or dtype
    for what, value in (("dtype", dtype), ("weights dtype", weights_dtype)):
        if value not in DTYPE_BITS:
            raise BadInput(f"{what} is {value!r}; expected one of {', '.join(DTYPE_BITS)}")
    for what, number in (("context", context), ("batch", 1 if batch is None else batch)):
        if type(number) is not int or number < 1:
            raise BadInput(f"{what} is {number!r}; expected a whole number, at least 1")
    if not 0 <= reserve < 1:
        raise BadInput(f"reserve is {reserve!r}; expected a fraction of the memory, 0 to below 1")
    layouts, skipped = _layouts(spec)
    rows = [
        _row(
            row_name,
            replace(spec, layout=layout),
            own=layout == spec.layout,
            memory=memory,
            reserved=_reserved(memory, reserve),
            context=context,
            wanted=batch or 1,
            dtypes=(dtype, weights_dtype),
        )
        for row_name, layout in layouts
    ]
    rows.sort(key=lambda row: (not row.own, -row.bytes_per_token))
    notes = []
    if context > spec.max_positions:
        notes.append(
            f"context {context:,} is more than the model's {spec.max_positions:,} positions: the "
            "memory is right, but the model cannot be run so far"
        )
    return Plan(
        name=name or folder or f"{spec.model_type} model, {spec.layout.describe()}",
        memory=memory,
        reserve=reserve,
        context=context,
        batch=batch,
        dtype=dtype,
        weights_dtype=weights_dtype,
        max_positions=spec.max_positions,
        rows=tuple(rows),
        skipped=tuple(skipped),
        notes=tuple(notes),
    )


def _spec_of(source: ModelSpec | Path | str) -> tuple[ModelSpec, str]:
    if isinstance(source, ModelSpec):
        return source, ""
    path = Path(source)
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    return read_model_spec(read_config(folder)), folder.resolve().name


def _reserved(memory: int, reserve: float) -> int:
    return ceil(memory * Fraction(str(reserve)))


def _layouts(spec: ModelSpec) -> tuple[list[tuple[str, KVLayout]], list[tuple[str, str]]]:
    """Layouts to compare, each once, and those this model's shapes rule out."""
    n, own = spec.num_layers, spec.layout
    maps: list[tuple[str, tuple[int, ...]]] = [("dense", identity(n))]
    remainders: tuple[Remainder, ...] = ("first", "last")
    for factor in range(2, min(4, n) + 1):
        for remainder in remainders if n % factor else remainders[:1]:
            tail = f" (remainder {remainder})" if n % factor else ""
            maps.append((f"CLA{factor}{tail}", uniform(n, factor, remainder)))
    maps += [
        ("CLA2-KeepEnds", keep_ends(n)),
        ("CLA2-DenseFront", dense_front(n)),
        ("CLA2-DenseBack", dense_back(n)),
        ("one owner", one_owner(n)),
    ]
    candidates = [(name, owners, own.kv_heads) for name, owners in maps]
    for heads, name in ((4, "GQA4"), (1, "MQA")):
        if heads < min(own.kv_heads) and spec.q_heads % heads == 0:
            candidates.append((f"dense, {name}", identity(n), (heads,) * n))
    found: dict[KVLayout, str] = {}
    skipped: list[tuple[str, str]] = []
    for name, owners, kv_heads in candidates:
        try:
            layout = KVLayout(owners, kv_heads, own.head_dim, own.window)
        except LayoutError as error:
            skipped.append((name, str(error)))
            continue
        found.setdefault(layout, name)  # short models: several names for one layout
    found.setdefault(own, "as configured")
    return [(name, layout) for layout, name in found.items()], skipped


def _row(
    name: str,
    spec: ModelSpec,
    *,
    own: bool,
    memory: int,
    reserved: int,
    context: int,
    wanted: int,
    dtypes: tuple[str, str],
) -> PlanRow:
    layout, (dtype, weights_dtype) = spec.layout, dtypes
    weights = -(-spec.parameters() * DTYPE_BITS[weights_dtype] // 8)
    budget = memory - reserved - weights
    slots = layout.slots_that_fit(max(budget, 0), context, dtype)
    reason = ""
    if weights > memory:
        reason = "the weights alone do not fit"
    elif budget < 0:
        reason = "weights and reserve alone do not fit"
    elif slots < wanted:
        reason = f"{slots} of {wanted} slots fit" if slots else "not one slot fits"
    return PlanRow(
        name=name,
        own=own,
        layout=layout,
        parameters=spec.parameters(),
        weight_bytes=weights,
        bytes_per_token=layout.bytes_per_token(dtype),
        bytes_per_slot=layout.bytes_per_slot(context, dtype),
        cache_budget=budget,
        slots=slots,
        largest_context=layout.context_that_fits(max(budget, 0), wanted, dtype),
        fits=not reason,
        reason=reason,
    )
