"""The contract of the operator `cla.ClaAttention`, as data; graphs/ops/cla_attention.json shows it.

python -m cla_export.plugin.contract graphs/ops/cla_attention.json
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cla_export.errors import BadInput

DOMAIN, NAME, VERSION = "cla", "ClaAttention", "1"
INT8_DOMAIN = "cla.int8"  # of the same operators over int8 caches, which take their scales too
DTYPES = ("float16", "bfloat16")
MIN_HEAD_DIM, MAX_HEAD_DIM = 2, 512


@dataclass(frozen=True, slots=True)
class Axis:
    """A symbolic dimension."""

    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output; dtype "T" is one of the operator's dtypes, the same throughout."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """A constant of the node."""

    name: str
    type: str
    default: int | float | None  # None: required
    meaning: str


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything a caller and an implementation must agree on."""

    domain: str
    name: str
    version: str
    summary: str
    dtypes: tuple[str, ...]
    axes: tuple[Axis, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    constraints: tuple[str, ...]
    semantics: tuple[str, ...]


CLA_ATTENTION = Contract(
    domain=DOMAIN,
    name=NAME,
    version=VERSION,
    summary="Attention that reads a key/value cache and never writes it, so any number of layers "
    "may share one cache.",
    dtypes=DTYPES,
    axes=(
        Axis("B", "batch: rows, each with a cache of its own"),
        Axis("Hq", "query heads"),
        Axis("Hkv", "key/value heads; query head h reads key/value head h // (Hq / Hkv)"),
        Axis("S", "query positions of this call: 1 in decode, more in a chunk"),
        Axis("C", "capacity of the cache, in tokens"),
        Axis("D", "head dim"),
    ),
    inputs=(
        Tensor("q", "T", ("B", "Hq", "S", "D"), "queries, not scaled"),
        Tensor("key_cache", "T", ("B", "Hkv", "C", "D"), "keys; this call's are written already"),
        Tensor("value_cache", "T", ("B", "Hkv", "C", "D"), "values, likewise"),
        Tensor(
            "kv_lengths", "int32", ("B",), "tokens each row holds, this call's S positions included"
        ),
    ),
    outputs=(Tensor("y", "T", ("B", "Hq", "S", "D"), "attention's output"),),
    attributes=(
        Attribute("scale", "float", None, "multiplies the scores, in float32"),
        Attribute("window", "int", 0, "keys a query sees, its own position included; 0: all"),
        Attribute("softcap", "float", 0.0, "scores become cap * tanh(score / cap); 0: they do not"),
    ),
    constraints=(
        "Hq % Hkv == 0",
        f"{MIN_HEAD_DIM} <= D <= {MAX_HEAD_DIM} and D % 2 == 0",
        "0 <= kv_lengths[b] <= C",
        "scale > 0",
        "window >= 0",
        "softcap >= 0",
        "all tensors are contiguous and start at a multiple of 16 bytes",
    ),
    semantics=(
        "query i of row b stands at position p = kv_lengths[b] - S + i",
        "it sees the keys j with max(0, p - window + 1) <= j <= p (without a window: 0 <= j <= p)",
        "a query that sees no key (p < 0: padding) gets zeros",
        "what the cache holds at j >= kv_lengths[b] has no influence, whatever it is",
        "every element of y is written",
        "the same inputs give the same bits",
        "in ONNX Runtime q and y may be packed, [B, S, Hq * D]; on a CPU the dtype is float32, and "
        "head dims are 16 or more, odd ones too",
    ),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """The shapes and attributes of one call."""

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    queries: int = 1
    scale: float = 1.0
    window: int = 0
    softcap: float = 0.0
    dtype: str = "float16"

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """Shape of q and of y."""
        return self.batch, self.query_heads, self.queries, self.head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Shape of key_cache and of value_cache."""
        return self.batch, self.kv_heads, self.capacity, self.head_dim


def check(problem: Problem) -> None:
    """Raise BadInput, naming the value, unless the call keeps the contract's constraints."""
    sizes = ("batch", "query_heads", "kv_heads", "head_dim", "capacity", "queries")
    wrong = [f"{n} is {v}, expected 1 or more" for n in sizes if (v := getattr(problem, n)) < 1]
    if not wrong and problem.query_heads % problem.kv_heads:
        wrong.append(
            f"{problem.query_heads} query heads do not divide among {problem.kv_heads} kv heads"
        )
    dim = problem.head_dim
    if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % 2:
        wrong.append(f"head_dim is {dim}, expected an even number up to {MAX_HEAD_DIM}")
    if problem.dtype not in DTYPES:
        wrong.append(f"dtype is {problem.dtype}, expected {' or '.join(DTYPES)}")
    if not problem.scale > 0:
        wrong.append(f"scale is {problem.scale}, expected more than 0")
    if problem.window < 0:
        wrong.append(f"window is {problem.window}, expected 0 (none) or more")
    if not problem.softcap >= 0:
        wrong.append(f"softcap is {problem.softcap}, expected 0 (none) or more")
    if wrong:
        raise BadInput(f"{NAME}: {'; '.join(wrong)}")


def to_json(contract: Contract = CLA_ATTENTION) -> str:
    """The contract as the text of graphs/ops/cla_attention.json."""
    data: dict[str, Any] = asdict(contract)
    return json.dumps(data, indent=2) + "\n"


def write(path: Path) -> None:
    """Write the contract's JSON to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
