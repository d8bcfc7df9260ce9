"""Calls of ClaAttention that tests check and benchmarks time, from one place.

`correctness_cases` walks the contract: dtypes, head dims, groupings, ragged lengths, windows,
softcap, chunks, padding. `speed_cases` are decode steps as servers see them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cla_export.plugin.contract import DTYPES, Problem

GARBAGE = (
    float("nan"),
    float("inf"),
    float("-inf"),
    6e4,
)  # what the cache holds beyond a row's length


@dataclass(frozen=True, slots=True)
class Case:
    """A call with its lengths; `name` is unique within its generator."""

    name: str
    problem: Problem
    lengths: tuple[int, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that the call has to read (16-bit elements, no window)."""
        width = 2 * self.problem.kv_heads * self.problem.head_dim * 2
        return sum(self.lengths) * width


def correctness_cases(capacity: int = 300, *, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """The contract's grid, one reason a case; lengths stay within `capacity` (at least 64)."""
    full = capacity
    ragged = (full, 1, 0, full // 2 + 3, 17, 64, full - 1)

    def case(name: str, lengths: tuple[int, ...], **changes: Any) -> Case:  # noqa: ANN401
        shape: dict[str, Any] = {"query_heads": 8, "kv_heads": 2, "head_dim": 128} | changes
        scale = shape["head_dim"] ** -0.5
        problem = Problem(**({"batch": len(lengths), "capacity": full, "scale": scale} | shape))
        return Case(f"{problem.dtype}-{name}", problem, lengths)

    for dtype in dtypes:
        for dim in (32, 46, 64, 80, 90, 96, 128, 160, 192, 256, 320, 512):
            yield case(f"head-dim-{dim}", ragged, head_dim=dim, dtype=dtype)
            yield case(f"head-dim-{dim}-chunk", ragged, head_dim=dim, queries=5, dtype=dtype)
        for query_heads, kv_heads in ((1, 1), (16, 1), (16, 4), (32, 8), (12, 2), (40, 1), (3, 3)):
            heads = {"query_heads": query_heads, "kv_heads": kv_heads}
            yield case(f"heads-{query_heads}-{kv_heads}", ragged, **heads, dtype=dtype)
            yield case(
                f"heads-{query_heads}-{kv_heads}-chunk", ragged, **heads, queries=7, dtype=dtype
            )
        for window in (1, 16, 33, full // 2, full * 2):
            yield case(f"window-{window}", ragged, window=window, dtype=dtype)
            yield case(f"window-{window}-chunk", ragged, window=window, queries=21, dtype=dtype)
        yield case("softcap", ragged, softcap=2.0, dtype=dtype)
        yield case("softcap-window-chunk", ragged, softcap=5.0, window=20, queries=9, dtype=dtype)
        yield case("prompt", (full, full // 3), queries=full, dtype=dtype)
        yield case("one-row", (full,), dtype=dtype)
        yield case("nothing", (0, 0), queries=3, dtype=dtype)
        yield case("many-rows", tuple(i % (full + 1) for i in range(70)), dtype=dtype)
        yield case("skewed", (full, *[3] * 40), query_heads=4, kv_heads=4, dtype=dtype)
        yield case("big-scores", ragged, scale=4.0, dtype=dtype)


def speed_cases(*, dtype: str = "float16") -> Iterator[Case]:
    """Decode steps at head dim 128: batch x context, then ragged and skewed batches."""
    generator = np.random.default_rng(0)
    for query_heads, kv_heads in ((16, 1), (16, 4)):
        for batch in (1, 8, 64):
            for context in (1024, 8192, 65536):
                if batch * context <= 64 * 8192 or kv_heads == 4:
                    yield speed_case(query_heads, kv_heads, (context,) * batch, dtype)
        lengths = tuple(int(n) for n in generator.integers(1, 8193, 64))
        yield speed_case(query_heads, kv_heads, lengths, dtype, "64 ragged, 1..8k")
        yield speed_case(query_heads, kv_heads, (65536, *[1024] * 15), dtype, "one 64k, 15 x 1k")


def speed_case(
    query_heads: int, kv_heads: int, lengths: tuple[int, ...], dtype: str, what: str = ""
) -> Case:
    """A decode step of rows that hold so many tokens, of random inputs."""
    capacity = -(-max(lengths) // 1024) * 1024
    problem = Problem(
        len(lengths), query_heads, kv_heads, 128, capacity, scale=128**-0.5, dtype=dtype
    )
    name = f"{query_heads}/{kv_heads} {what or f'{len(lengths)} x {capacity // 1024}k'}"
    return Case(name, problem, lengths)


def random_inputs(case: Case, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """float32 inputs of a case, rounded by nobody yet; beyond each length the cache is GARBAGE."""
    generator = np.random.default_rng(seed)
    problem = case.problem
    q = generator.standard_normal(problem.query_shape, np.float32)
    caches = []
    for _ in range(2):
        cache = generator.standard_normal(problem.cache_shape, np.float32)
        for row, length in enumerate(case.lengths):
            beyond = cache[row, :, length:]
            beyond[...] = generator.choice(np.array(GARBAGE, np.float32), beyond.shape)
        caches.append(cache)
    lengths = np.array(case.lengths, np.int32)
    return {"q": q, "key_cache": caches[0], "value_cache": caches[1], "kv_lengths": lengths}
