"""What sharing KV buys a server: requests side by side, and tokens per second, under one budget.

    python scripts/bench_serve_memory.py --json OUT.json --csv OUT.csv --plot OUT.svg
    python scripts/bench_serve_memory.py --layers 4 --budgets 16MiB --rounds 1    a quick look

The same model with random weights, dense, with CLA2 and with CLA4: all else is equal. The engine
that `serve` has runs as many slots as a budget for keys and values holds, on a queue of requests of
mixed lengths; tokens are counted while requests wait, so that no slot is ever free. Factors take
turns within a round, and a rate is the median of its rounds'.

Time is the processor's, and one thread computes: other programs on the machine count little. With
--wall it is the clock's, and --threads may be more; nothing else should run then.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from bench_memory import LOOKS, make_bundle, name_of, sizes
from matplotlib.figure import Figure
from provenance import heading, provenance
from random_model import SHAPE, add_shape_options

from cla_export.bundle import Bundle, write_json
from cla_export.engines.opening import open_executor
from cla_export.serve import sequence
from cla_export.serve.engine import Engine
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Outputs

FACTORS = (1, 2, 4)
PROMPTS, ANSWERS = (16, 96), (64, 160)  # tokens of each request, from and to
TURNS = 3  # requests for each slot


@dataclass(slots=True)
class Row:
    """One sharing factor under one budget."""

    factor: int
    budget: int  # bytes
    slots: int
    rates: list[float] = field(default_factory=list)  # tokens/s, of each round

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates)


class Watch:
    """Counts an engine's tokens, and when the last of its requests got a slot."""

    def __init__(self, requests: int, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._left = self._ends = requests
        self.tokens = 0
        self.full: tuple[float, int] = (0.0, 0)  # when the last one was admitted; tokens until then
        self.done = threading.Event()

    def deliver(self, outputs: Outputs) -> None:
        for _, output in outputs:
            assert output.failure is None, output.failure
            self.tokens += len(output.tokens)
            self._ends -= output.last
        if not self._ends:
            self.done.set()

    def admitted(self, _sequence: sequence.Sequence) -> None:
        self._left -= 1
        if not self._left:
            self.full = (self.clock(), self.tokens)

    def stepped(self, *_: object) -> None:
        pass

    def ended(self, *_: object) -> None:
        pass


def requests(bundle: Bundle, count: int) -> list[Request]:
    random = np.random.default_rng(0)
    return [
        Request(
            tuple(random.integers(3, bundle.vocab_size, random.integers(*PROMPTS)).tolist()),
            int(random.integers(*ANSWERS)),
            ignore_eos=True,
            stream=True,
        )
        for _ in range(count)
    ]


def rate(bundle: Bundle, slots: int, options: argparse.Namespace) -> float:
    """Tokens per second with all slots busy, prompts' reading included."""
    asked = requests(bundle, TURNS * slots)
    watch = Watch(len(asked), time.perf_counter if options.wall else time.process_time)
    executor = open_executor(bundle, slots=slots, capacity=options.context, threads=options.threads)
    executor.decode(range(slots), [5] * slots, [0] * slots)  # warms up
    engine = Engine(executor, watch.deliver, observer=watch)
    engine.submit(asked)  # before the start: all wait when it begins
    began = watch.clock()
    engine.start()
    watch.done.wait()
    engine.stop()
    until, tokens = watch.full
    return tokens / (until - began)


def measure(bundles: Mapping[int, Bundle], options: argparse.Namespace) -> list[Row]:
    """Every factor under every budget."""
    rows = [
        Row(factor, budget, bundle.layout.slots_that_fit(budget, options.context, "float32"))
        for budget in options.budgets
        for factor, bundle in bundles.items()
    ]
    for index in range(options.rounds):
        for row in rows:
            found = rate(bundles[row.factor], row.slots, options)
            row.rates.append(found)
            print(f"round {index}: {row.budget / 2**20:g} MiB, {name_of(row.factor)}, {row.slots} "
                  f"slots: {found:.1f} tokens/s", file=sys.stderr, flush=True)  # fmt: skip
    return rows


def times_dense(row: Row, rows: Sequence[Row]) -> float:
    """Throughput over the dense model's under the same budget, median of the rounds' ratios."""
    dense = next(r for r in rows if r.budget == row.budget and r.factor == 1)
    return statistics.median(a / b for a, b in zip(row.rates, dense.rates, strict=True))


def markdown(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    model = run["model"]
    lines = [
        heading(run),
        f"{model['layers']} layers of {model['hidden']}, {model['heads']} heads on "
        f"{model['kv_heads']} kv heads of {model['head_dim']}; slots of {run['context']:,} tokens; "
        f"prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, {ANSWERS[0]} to {ANSWERS[1]} new ones; "
        f"seconds are {'the clock' if run['wall'] else 'the processor'}'s.\n",
        "| KV budget MiB | sharing | slots | tokens/s | x dense |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {row.budget / 2**20:g} | {name_of(row.factor)} | {row.slots} "
        f"| {row.tokens_per_s:,.1f} | {times_dense(row, rows):.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["budget_bytes", "factor", "slots", "tokens_per_s", "times_dense"])
        for row in rows:
            figures = row.tokens_per_s, times_dense(row, rows)
            writer.writerow([row.budget, row.factor, row.slots, *(f"{it:.3f}" for it in figures)])


def plot(run: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Throughput and slots over the budget, a line for each factor."""
    mpl.rcParams["svg.hashsalt"] = "serve-memory"
    figure = Figure(figsize=(9.5, 4.3), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, attribute, title in (
        (panels[0], "slots", f"requests side by side, slots of {run['context']:,} tokens"),
        (panels[1], "tokens_per_s", "tokens/s served, prompts' reading included"),
    ):
        for factor in FACTORS:
            marker, color = LOOKS[factor]
            line = [(row.budget / 2**20, getattr(row, attribute)) for row in rows
                    if row.factor == factor]  # fmt: skip
            axes.plot(*zip(*line, strict=True), marker=marker, color=color, label=name_of(factor))
            for budget, value in line:
                place = (0, 6 if factor == FACTORS[-1] else -13)
                axes.annotate(f"{value:,.0f}", (budget, value), place, fontsize=8, color=color,
                              textcoords="offset points", ha="center")  # fmt: skip
        budgets = sorted({row.budget / 2**20 for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.set_xlabel("budget for keys and values, MiB")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(y=0.12)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    model, place = run["model"], run["machine"]
    figure.suptitle(
        f"{model['layers']} layers of {model['hidden']}, {model['kv_heads']} kv heads of "
        f"{model['head_dim']}, float32, {place['threads']} of {place['cpus']} CPUs of "
        f"{place['processor']}, {run['date']}",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="of a slot")
    parser.add_argument("--budgets", type=sizes, default="48MiB,96MiB,192MiB,384MiB")
    parser.add_argument("--wall", action="store_true", help="the clock's seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg or .png")
    add_shape_options(parser, kv_heads=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {factor: make_bundle(Path(scratch), options, factor) for factor in FACTORS}
        rows = measure(bundles, options)
    run = {
        **provenance(options.threads),
        "model": {name: getattr(options, name) for name in SHAPE},
        "context": options.context,
        "wall": options.wall,
        "rows": [asdict(row) for row in rows],
    }
    text = markdown(run, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, run)
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(run, rows, options.plot)


if __name__ == "__main__":
    main()
