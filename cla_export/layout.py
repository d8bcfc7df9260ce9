"""KV layout: which layer's key/value cache each layer reads, and what the caches weigh.

`kv_owner[i]` is the layer whose cache layer i reads. A layer that owns itself writes one cache;
the layers that read it are its sharers; together they are a group. Groups need not be contiguous.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, cast

from cla_export.errors import LayoutError
from cla_export.layout_config import read_config

DTYPE_BITS: Mapping[str, int] = {
    "float32": 32, "fp32": 32,
    "float16": 16, "fp16": 16, "bfloat16": 16, "bf16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "fp8": 8, "int8": 8,
    "int4": 4,
}  # fmt: skip
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of a model, as options say
FIELDS = ("kv_owner", "kv_heads", "head_dim", "window")
Remainder = Literal["first", "last"]
T = TypeVar("T")


def bits(dtype: str) -> int:
    """Bits of one cache element of `dtype`; LayoutError if the name is not in DTYPE_BITS."""
    if dtype not in DTYPE_BITS:
        raise LayoutError(f"cache dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BITS)}")
    return DTYPE_BITS[dtype]


@dataclass(frozen=True, slots=True)
class Group:
    """One owner and its sharers: one key cache and one value cache."""

    index: int
    owner: int
    layers: tuple[int, ...]  # ascending; the owner is the first
    kv_heads: int
    head_dim: int
    window: int | None  # sliding window in tokens; None = full attention

    @property
    def sharers(self) -> tuple[int, ...]:
        """Layers that read this cache without writing it."""
        return self.layers[1:]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Owner map and cache shape of every layer. `create` takes scalars and lists too.

    Raises LayoutError, naming the layer, unless all of these hold:
    1. the four tuples have one entry per layer, at least one layer, of positive whole numbers;
    2. `kv_owner[i] <= i`: a layer reads a cache that was written before it;
    3. `kv_owner[kv_owner[i]] == kv_owner[i]`: an owner reads its own cache;
    4. kv heads, head dim and window are equal within a group.
    """

    kv_owner: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    window: tuple[int | None, ...]

    def __post_init__(self) -> None:
        shape = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "window": self.window}
        for name, values in {"kv_owner": self.kv_owner, **shape}.items():
            _check_entries(name, values, len(self.kv_owner))  # 1
        for layer, owner in enumerate(self.kv_owner):
            where = f"layer {layer}: kv_owner is {owner}"
            if owner > layer:  # 2
                raise LayoutError(
                    f"{where}, which is later than the layer; owners come first "
                    f"(got {_show(self.kv_owner)}): use a layer in 0..{layer}"
                )
            if self.kv_owner[owner] != owner:  # 3
                above = self.kv_owner[owner]
                raise LayoutError(
                    f"{where}, but layer {owner} has no cache of its own: it reads layer {above}; "
                    f"set kv_owner[{layer}] to {above}, or kv_owner[{owner}] to {owner}"
                )
            for name, values in shape.items():  # 4
                if values[layer] != values[owner]:
                    raise LayoutError(
                        f"{where}, but their {name} differ: layer {layer} has {values[layer]}, "
                        f"layer {owner} has {values[owner]}; one cache has one shape: make them "
                        f"equal, or set kv_owner[{layer}] to {layer}"
                    )

    @classmethod
    def create(
        cls,
        kv_owner: Sequence[int],
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        window: int | Sequence[int | None] | None = None,
    ) -> "KVLayout":
        """Layout from any sequences; a single number holds for every layer."""
        n = len(kv_owner)
        return cls(
            tuple(kv_owner), _per_layer(kv_heads, n), _per_layer(head_dim, n), _per_layer(window, n)
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.kv_owner)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in owner order."""
        members: dict[int, list[int]] = {}
        for layer, owner in enumerate(self.kv_owner):
            members.setdefault(owner, []).append(layer)  # an owner comes first, so in owner order
        return tuple(
            Group(g, o, tuple(layers), self.kv_heads[o], self.head_dim[o], self.window[o])
            for g, (o, layers) in enumerate(members.items())
        )

    @property
    def num_groups(self) -> int:
        """Key/value cache pairs."""
        return len(set(self.kv_owner))

    @property
    def sharing_factor(self) -> float:
        """Layers per group."""
        return self.num_layers / self.num_groups

    def group_of(self, layer: int) -> int:
        """Index of the group whose cache `layer` reads."""
        return sorted(set(self.kv_owner)).index(self.kv_owner[self._checked(layer)])

    def is_owner(self, layer: int) -> bool:
        """Whether `layer` writes the cache it reads."""
        return self.kv_owner[self._checked(layer)] == layer

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token's keys and values in all groups.

        A group's key row, and its value row, rounds up to a whole byte (int4, odd width).
        """
        width = bits(dtype)
        return sum(2 * -(-g.kv_heads * g.head_dim * width // 8) for g in self.groups)

    def bytes_per_slot(self, capacity: int, dtype: str) -> int:
        """Bytes of one slot of `capacity` tokens; a windowed group holds all of them too."""
        return _at_least("capacity", capacity, 1) * self.bytes_per_token(dtype)

    def slots_that_fit(self, memory_bytes: int, capacity: int, dtype: str) -> int:
        """Most slots of `capacity` tokens in `memory_bytes`; 0 if not even one fits."""
        return _at_least("memory_bytes", memory_bytes, 0) // self.bytes_per_slot(capacity, dtype)

    def context_that_fits(self, memory_bytes: int, slots: int, dtype: str) -> int:
        """Largest capacity, in tokens, at which `slots` slots fit in `memory_bytes`; may be 0."""
        per_token = _at_least("slots", slots, 1) * self.bytes_per_token(dtype)
        return _at_least("memory_bytes", memory_bytes, 0) // per_token

    def dense_twin(self) -> "KVLayout":
        """The same model without sharing: every layer its own owner."""
        return KVLayout(identity(self.num_layers), self.kv_heads, self.head_dim, self.window)

    def describe(self) -> str:
        """One line, such as `20 layers in 10 groups, CLA2`."""
        n, g = self.num_layers, self.num_groups
        return f"{_count(n, 'layer')} in {_count(g, 'group')}, {_pattern_of(self.kv_owner)}"

    def to_json(self) -> dict[str, list[int] | list[int | None]]:
        """Plain lists, one entry per layer; `from_json` reads them back."""
        return {field: list(getattr(self, field)) for field in FIELDS}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "KVLayout":
        """Read what `to_json` wrote; LayoutError on a missing, unknown or malformed key."""
        if set(data) != set(FIELDS) or not all(isinstance(v, list) for v in data.values()):
            raise LayoutError(
                f"KV layout is {dict(data)!r}; expected {', '.join(FIELDS)}, each a list with one "
                f"entry per layer, and no other key"
            )
        return cls(*(tuple(cast(list[int], data[field])) for field in FIELDS))

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            raise LayoutError(f"layer {layer}: there is none; layers are 0..{self.num_layers - 1}")
        return layer


def layout_from_config(config: Mapping[str, object]) -> KVLayout:
    """KV layout of a model's config.json, in any spelling that `layout_config` reads.

    Raises LayoutError naming the config key, or the layer, that is missing, wrong or ambiguous.
    """
    found = read_config(config)
    try:
        return KVLayout(found.kv_owner, found.kv_heads, found.head_dim, found.window)
    except LayoutError as error:
        raise LayoutError(f"config {found.source}: {error}") from error


# Owner maps. Each returns kv_owner for n layers.


def identity(n: int) -> tuple[int, ...]:
    """Every layer its own owner: 0, 1, 2, ..."""
    return tuple(range(_at_least("layers", n, 1)))


def one_owner(n: int) -> tuple[int, ...]:
    """Every layer reads layer 0."""
    return (0,) * _at_least("layers", n, 1)


def uniform(n: int, factor: int, remainder: Remainder | None = None) -> tuple[int, ...]:
    """CLA<factor>: groups of `factor` neighbours, the first of each its owner.

    Where `factor` does not divide n the odd-sized group must be placed: `remainder="first"` as
    in Figure 2 of the paper (10 layers, factor 3: 0, 1,1,1, 4,4,4, 7,7,7) or `"last"`
    (0,0,0, 3,3,3, 6,6,6, 9). LayoutError if it is not said.
    """
    _at_least("layers", n, 1)
    rest = n % _at_least("sharing factor", factor, 1)
    if remainder not in (None, "first", "last"):
        raise LayoutError(f"remainder is {remainder!r}; expected 'first' or 'last'")
    if rest and remainder is None:
        raise LayoutError(
            f"sharing factor {factor} does not divide {n} layers; say which group is short: "
            f"remainder='first' ({_show(uniform(n, factor, 'first'))}) or "
            f"remainder='last' ({_show(uniform(n, factor, 'last'))})"
        )
    if remainder != "first":
        rest = 0
    return tuple(0 if i < rest else i - (i - rest) % factor for i in range(n))


def keep_ends(n: int) -> tuple[int, ...]:
    """CLA2-KeepEnds: the first and last layers own, pairs between (0, 1,1, 3,3, ..., n-1).

    If n is odd one inside layer is left over; it is layer 1, as in the paper's remainder-first
    rule: 0, 1, 2,2, 4,4, ..., n-1. Up to 3 layers nothing is shared.
    """
    if _at_least("layers", n, 1) <= 3:
        return identity(n)
    return (0, *(owner + 1 for owner in uniform(n - 2, 2, "first")), n - 1)


def dense_front(n: int) -> tuple[int, ...]:
    """CLA2-DenseFront: n // 2 plain layers, sharers of the last of them, the last layer its own.

    20 layers: 0..9, then nine sharers of 9, then 19. Up to 2 layers nothing is shared.
    """
    plain = max(_at_least("layers", n, 1) // 2, 1)
    return tuple(i if i < plain or i == n - 1 else plain - 1 for i in range(n))


def dense_back(n: int) -> tuple[int, ...]:
    """CLA2-DenseBack: layers 0 and 1 own, n // 2 - 1 sharers of layer 1, the rest own.

    20 layers: 0, 1, then nine sharers of 1, then 11..19. The paper's text says ten sharers, which
    would make 21 layers; its table says 20 layers and 11 caches. Up to 3 layers nothing is shared.
    """
    return tuple(1 if 1 < i <= n // 2 else i for i in range(_at_least("layers", n, 1)))


# Names of the CLA paper, such as H128-MQA-CLA2-KeepEnds (section 3).


class PaperName(NamedTuple):
    """A configuration name, read."""

    head_dim: int
    kv_heads: int | Literal["MHA"]  # MHA: as many as query heads
    pattern: str  # identity, CLA<k>, KeepEnds, DenseFront or DenseBack


_NAMED = {"KeepEnds": keep_ends, "DenseFront": dense_front, "DenseBack": dense_back}
_PAPER_NAME = re.compile(
    rf"H([1-9]\d*)-(MHA|MQA|GQA([1-9]\d*))(?:-(CLA[1-9]\d*|CLA2-({'|'.join(_NAMED)})))?", re.ASCII
)


def parse_paper_name(name: str) -> PaperName:
    """Read `H<head_dim>-<MHA|MQA|GQAn>[-CLAk|-CLA2-<KeepEnds|DenseFront|DenseBack>]`."""
    match = _PAPER_NAME.fullmatch(name)
    if match is None:
        raise LayoutError(
            f"configuration name {name!r} is not one of the paper's; expected "
            f"H<head dim>-<MHA, MQA or GQAn>[-CLAk][-{', '.join(_NAMED)}], such as H128-MQA-CLA2; "
            f"the three named patterns go with CLA2 only"
        )
    head_dim, kind, gqa, sharing, named = match.groups()
    kv_heads: int | Literal["MHA"] = "MHA" if kind == "MHA" else int(gqa or 1)
    return PaperName(int(head_dim), kv_heads, named or sharing or "identity")


def paper_layout(
    name: str, num_layers: int, q_heads: int, remainder: Remainder = "first"
) -> KVLayout:
    """KV layout of a paper name; `remainder` matters where CLAk does not divide the layers."""
    head_dim, heads, pattern = parse_paper_name(name)
    kv_heads = q_heads if heads == "MHA" else heads
    if _at_least("query heads", q_heads, 1) % kv_heads:
        raise LayoutError(f"{name}: {q_heads} query heads cannot share {kv_heads} kv heads evenly")
    if pattern in _NAMED:
        return KVLayout.create(_NAMED[pattern](num_layers), kv_heads, head_dim)
    factor = int(pattern.removeprefix("CLA")) if pattern != "identity" else 1
    return KVLayout.create(uniform(num_layers, factor, remainder), kv_heads, head_dim)


def _pattern_of(owners: tuple[int, ...]) -> str:
    """Name an owner map, or say who shares with whom."""
    n, groups = len(owners), len(set(owners))
    if groups == n:
        return "no sharing"
    if groups == 1:
        return "one owner"
    factor = -(-n // groups)
    if n % factor == 0 and owners == uniform(n, factor):
        return f"CLA{factor}"
    for name, owner_map in _NAMED.items():
        if owners == owner_map(n):
            return f"CLA2-{name}"
    for factor in range(2, n):
        for remainder in ("first", "last"):
            if owners == uniform(n, factor, remainder):
                return f"CLA{factor} (remainder {remainder})"
    shared = sorted({owner for layer, owner in enumerate(owners) if owner != layer})
    return f"{_count(n - groups, 'sharer')} of {_count(len(shared), 'owner')} ({_show(shared)})"


def _check_entries(name: str, values: tuple[int | None, ...], n: int) -> None:
    if not isinstance(values, tuple):
        raise LayoutError(f"{name} is a {type(values).__name__}; use KVLayout.create for it")
    if len(values) != n or n == 0:
        raise LayoutError(f"{name} has {len(values)} entries; expected {max(n, 1)}, one per layer")
    for layer, value in enumerate(values):
        if value is None and name == "window":
            continue
        if type(value) is not int or value < (name != "kv_owner"):
            wanted = "a layer number" if name == "kv_owner" else "a positive whole number"
            raise LayoutError(f"layer {layer}: {name} is {value!r}; expected {wanted}")


def _per_layer(value: T | Sequence[T], n: int) -> tuple[T, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * n


def _at_least(name: str, value: int, least: int) -> int:
    if type(value) is not int or value < least:
        raise LayoutError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return value


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _show(values: Sequence[int]) -> str:
    return ",".join(map(str, values[:8])) + (",..." if len(values) > 8 else "")
