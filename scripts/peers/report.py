"""A run as JSON, and as a table in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from provenance import heading, provenance

from cla_export.floor import kv_bytes
from cla_export.spec import ModelSpec
from peers.cells import Row


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of float32 weights that a step reads: all, but of an untied embedding a few rows."""
    looked_up = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    return 4 * (spec.parameters() - looked_up)


def conclude(row: Row, spec: ModelSpec, bandwidth: float) -> None:
    """Turn a row's rounds into its numbers."""
    if row.outcome != "ok":
        return
    row.ms_per_step = statistics.median(row.round_ms)
    tokens = row.batch * (row.context if row.phase == "prefill" else 1)
    row.tokens_per_s = tokens / row.ms_per_step * 1e3
    if row.phase == "decode":
        size = weight_bytes(spec) + kv_bytes(spec.layout, "float32", row.batch, row.context)
        row.floor_share = size / bandwidth * 1e3 / row.ms_per_step


def summary(
    spec: ModelSpec, rows: Sequence[Row], bandwidths: Sequence[float], threads: int
) -> dict[str, Any]:
    """All of a run, as --json writes it."""
    return {
        **provenance(threads),
        "model": {
            "layout": spec.layout.describe(),
            "kv_layout": spec.layout.to_json(),
            "parameters": spec.parameters(),
            "weight_bytes_per_step": weight_bytes(spec),
            "kv_bytes_per_token": spec.layout.bytes_per_token("float32"),
        },
        "bandwidth_bytes_per_s": {
            "median": statistics.median(bandwidths),
            "samples": bandwidths,
        },
        "rows": [asdict(row) for row in rows],
    }


def markdown(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A row for each cell, a column for each peer."""
    model, bandwidth = run["model"], run["bandwidth_bytes_per_s"]["median"]
    peers = list(dict.fromkeys(row.peer for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.cell.name, {})[row.peer] = row
    lines = [
        heading(run),
        f"{model['parameters'] / 1e6:,.0f} M parameters, {model['layout']}; a step reads "
        f"{model['weight_bytes_per_step'] / 2**20:,.0f} MiB of weights and "
        f"{model['kv_bytes_per_token']:,} B a token of context; memory read at "
        f"{bandwidth / 1e9:.1f} GB/s. ms a step (tokens/s), share of the floor.\n",
        f"| batch / context | {' | '.join(peers)} |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for name, by_peer in found.items():
        shown = [cell_text(by_peer[peer]) if peer in by_peer else "-" for peer in peers]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    peaks = {peer: [row.peak_rss_bytes or 0 for row in rows if row.peer == peer] for peer in peers}
    sizes = [f"{max(peaks[peer]) / 2**20:,.0f}" if any(peaks[peer]) else "-" for peer in peers]
    lines.append(f"| peak memory, MiB | {' | '.join(sizes)} |")
    lines += ["", *(f"- {row.peer}, {name}: {row.outcome}" for name, by_peer in found.items()
                    for row in by_peer.values() if row.outcome != "ok")]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def cell_text(row: Row) -> str:
    if row.ms_per_step is None:
        return row.outcome.partition(":")[0]
    share = "" if row.floor_share is None else f" {row.floor_share:.0%}"
    return f"{row.ms_per_step:,.1f} ({row.tokens_per_s:,.0f}){share}"
