"""What sharing KV buys in memory: slots, throughput and context under one budget for caches.

    python scripts/bench_memory.py --json OUT.json --markdown OUT.md --plot OUT.svg
    python scripts/bench_memory.py --layers 4 --context 256 --budgets 1MiB,2MiB    a quick look

The same model with random weights, dense and with CLA2, CLA3 and CLA4: all else is equal. For each
budget, how many slots of the context fit; the decode throughput with all of them full, by the
bundle's executor on this CPU, median over rounds of the median step; and the longest context that
one slot could have, as memory allows. The budget is of caches alone, in float32.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peers.timing import WARM, decode_ms
from provenance import heading, provenance
from random_model import SHAPE, add_shape_options, config_of, made_up, make_model

from cla_export.bundle import Bundle, write_json
from cla_export.engines.executor import Executor
from cla_export.engines.opening import open_executor
from cla_export.exporter import export
from cla_export.layout import KVLayout
from cla_export.planning import parse_bytes

FACTORS = (1, 2, 3, 4)
LOOKS = {  # marker and colour, by factor
    1: ("o", "#6b7280"),
    2: ("s", "#1d4ed8"),
    3: ("^", "#15803d"),
    4: ("D", "#c2410c"),
}


@dataclass(slots=True)
class Row:
    """One sharing factor under one budget. Sizes in bytes, contexts in tokens."""

    factor: int
    budget: int
    context: int
    slots_that_fit: int
    slots: int  # that were run: those that fit, up to --max-slots
    pool_bytes: int  # of the slots that were run
    longest_context: int  # of one slot
    ms_per_step: float | None = None
    tokens_per_s: float = 0.0
    round_ms: list[float] = field(default_factory=list)  # medians


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--budgets", type=sizes, default="64MiB,128MiB,256MiB,512MiB")
    parser.add_argument("--max-slots", type=int, default=32, help="slots to run at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg or .png")
    add_shape_options(parser)
    options = parser.parse_args()
    if options.context <= WARM + options.steps:
        parser.error(f"--context {options.context} leaves no room for the steps")
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {factor: make_bundle(Path(scratch), options, factor) for factor in FACTORS}
        rows = measure(bundles, options)
    run = summary(rows, options)
    text = markdown(run, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, run)
    if options.plot:
        plot(run, rows, options.plot)
    return 0


def sizes(text: str) -> list[int]:
    return [parse_bytes(item) for item in text.split(",")]


def make_bundle(scratch: Path, options: argparse.Namespace, factor: int) -> Bundle:
    source = scratch / f"model{factor}"
    make_model(source, config_of(options, factor, options.context))
    return export(source, scratch / f"bundle{factor}")


def plan(layout: KVLayout, factor: int, budget: int, options: argparse.Namespace) -> Row:
    """What fits in a budget, not timed yet."""
    fit = layout.slots_that_fit(budget, options.context, "float32")
    slots = min(fit, options.max_slots)
    return Row(
        factor=factor,
        budget=budget,
        context=options.context,
        slots_that_fit=fit,
        slots=slots,
        pool_bytes=slots * layout.bytes_per_slot(options.context, "float32"),
        longest_context=layout.context_that_fits(budget, 1, "float32"),
    )


def measure(bundles: Mapping[int, Bundle], options: argparse.Namespace) -> list[Row]:
    """Every factor under every budget; a round goes through all, one model at a time."""
    rows = {
        factor: [plan(bundle.layout, factor, budget, options) for budget in options.budgets]
        for factor, bundle in bundles.items()
    }
    for _ in range(options.rounds):
        for factor, bundle in bundles.items():
            time_round(bundle, rows[factor], options)
    found = [row for by_budget in rows.values() for row in by_budget]
    for row in found:
        if row.round_ms:
            row.ms_per_step = statistics.median(row.round_ms)
            row.tokens_per_s = row.slots / row.ms_per_step * 1e3
    return found


def time_round(bundle: Bundle, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Time each budget's slots: the first of one pool, which is as large as the largest needs."""
    most = max(row.slots for row in rows)
    if most == 0:
        return
    executor = open_executor(bundle, capacity=options.context, slots=most, threads=options.threads)
    held = options.context - WARM - options.steps
    for group, _, keys, values in made_up(bundle.layout, 1, held):
        for slot in range(most):
            executor.write(group, slot, keys, values)
    timed: dict[int, float] = {}  # by slots: budgets may share them
    for row in rows:
        if row.slots:
            if row.slots not in timed:
                timed[row.slots] = step_ms(executor, row.slots, held, options.steps)
            row.round_ms.append(timed[row.slots])
            print(f"factor {row.factor}, {row.slots} slots: {row.round_ms[-1]:.2f} ms",
                  file=sys.stderr)  # fmt: skip


def step_ms(executor: Executor, slots: int, held: int, steps: int) -> float:
    """Median milliseconds of a greedy step over so many slots, which end up full."""

    def step(tokens: Sequence[int], length: int) -> Sequence[int]:
        best: list[int] = (
            executor.decode(range(slots), tokens, [length] * slots).argmax(-1).tolist()
        )
        return best

    return statistics.median(decode_ms(step, slots, held, steps))


def summary(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """All of a run, as --json writes it."""
    return {
        **provenance(options.threads),
        "model": {name: getattr(options, name) for name in SHAPE},
        "context": options.context,
        "max_slots": options.max_slots,
        "rows": [asdict(row) for row in rows],
    }


def name_of(factor: int) -> str:
    return "dense" if factor == 1 else f"CLA{factor}"


def markdown(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A row for each budget and factor."""
    model = run["model"]
    lines = [
        heading(run),
        f"{model['layers']} layers, hidden size {model['hidden']}, kv heads x head dim "
        f"{model['kv_heads']} x {model['head_dim']}; slots of {run['context']:,} tokens, all full, "
        f"{run['max_slots']} run at most.\n",
        "| budget MiB | sharing | slots that fit | run | pool MiB | ms a step | tokens/s "
        "| longest context of one slot |",
        "|---" * 8 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row.budget, row.factor)):
        step = "-" if row.ms_per_step is None else f"{row.ms_per_step:,.1f}"
        lines.append(
            f"| {row.budget / 2**20:g} | {name_of(row.factor)} | {row.slots_that_fit} | "
            f"{row.slots} | {row.pool_bytes / 2**20:,.1f} | {step} | {row.tokens_per_s:,.0f} | "
            f"{row.longest_context:,} |"
        )
    return "\n".join(lines) + "\n"


def plot(run: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Three panels over the budget: slots, throughput, longest context; a line for each factor."""
    mpl.rcParams["svg.hashsalt"] = "memory"
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (attribute, title) in zip(
        panels,
        (
            ("slots_that_fit", f"slots of {run['context']:,} tokens that fit"),
            ("tokens_per_s", f"decode of them, {run['max_slots']} at most, tokens/s"),
            ("longest_context", "longest context of one slot, tokens"),
        ),
        strict=True,
    ):
        draw(axes, rows, attribute, title)
    model, place = run["model"], run["machine"]
    figure.suptitle(
        f"{model['layers']} layers, kv heads x head dim {model['kv_heads']} x "
        f"{model['head_dim']}, float32, "
        f"{place['threads']} threads of {place['processor']}, {run['date']}",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(axes: Axes, rows: Sequence[Row], attribute: str, title: str) -> None:
    """One panel."""
    for factor, (marker, color) in LOOKS.items():
        line = sorted((row.budget / 2**20, getattr(row, attribute)) for row in rows
                      if row.factor == factor)  # fmt: skip
        budgets, values = zip(*line, strict=True)
        axes.plot(budgets, values, marker=marker, color=color, label=name_of(factor))
    budgets_mib = sorted({row.budget / 2**20 for row in rows})
    axes.set_xticks(budgets_mib, [f"{budget:g}" for budget in budgets_mib])
    axes.set_xlabel("budget for keys and values, MiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
