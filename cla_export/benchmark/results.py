"""What bench measured: a row for each cell, and all of a run as plain data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cla_export.errors import BadInput


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: decode steps of `batch` rows that hold `context` tokens, or one prompt's prefill.

    Times are milliseconds of a step (of the whole prompt): the median, and where the fastest and
    the slowest tenth begin; where steps are timed together, of a timing's mean step. `tokens_per_s`
    is of all rows together.

    `peak_device_bytes` is by how much the memory in use on the GPU had grown from before the first
    cell until this one's last step was done, its executor open: weights, caches, workspaces and the
    code of kernels, but not the CUDA context. An executor gives nothing back before it is closed,
    so that is its peak. What other processes take or free meanwhile is in it too.
    """

    phase: str  # decode or prefill
    batch: int
    context: int  # tokens; of prefill, the prompt's
    ms_per_step: float
    ms_p10: float
    ms_p90: float
    tokens_per_s: float
    floor_share: float | None  # the floor's time over the median; None: prefill, or no floor known
    kv_bytes: int  # of the keys and values that a step can see, once for each group
    peak_rss_bytes: int  # of this process, from opening the bundle on
    peak_device_bytes: int | None = None  # None: not on a GPU, or of an earlier version

    @property
    def name(self) -> str:
        return name_of(self.phase, self.batch, self.context)

    @property
    def spread(self) -> float:
        """From p10 to p90, as a share of the median."""
        return (self.ms_p90 - self.ms_p10) / self.ms_per_step


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured, on what."""

    bundle: str
    backend: str
    graph: str | None  # the file that ONNX Runtime ran; None: another backend
    date: str
    machine: Mapping[str, str | int | None]
    tools: Mapping[str, str]  # versions
    bandwidth_bytes_per_s: float | None  # median; None: not of the memory that it computes in
    weight_bytes: int | None  # that every step reads; see `read_weights`
    rows: tuple[Row, ...]
    command: str | None = None

    def to_json(self) -> dict[str, object]:
        """Plain data; `from_json` reads it back."""
        content = {**asdict(self), "rows": [asdict(row) for row in self.rows]}
        if self.command is None:
            del content["command"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Bench":
        """Read what `to_json` wrote; TypeError or KeyError for anything else."""
        return cls(**{**content, "rows": tuple(Row(**row) for row in content["rows"])})


def name_of(phase: str, batch: int, context: int) -> str:
    """A cell in words."""
    return f"{phase}, batch {batch}, context {context:,}"


def read_bench(path: Path) -> Bench:
    """A stored result of `bench`; BadInput for anything else."""
    try:
        return Bench.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: no such file; expected the JSON of an earlier run, as `cla-export bench "
            "BUNDLE --output FILE` writes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a stored bench ({error!r})") from error
