"""Every peer in every cell, in turn."""

import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from cla_export.bandwidth import read_bandwidth
from cla_export.bundle import Bundle
from peers import PREFILL_PEERS
from peers.cells import Cell, Row
from peers.timing import check_logits, time_round
from peers.worker import Failed, Worker

ALLOWED = 1e-3  # of a logit; rounding moves one by 1e-5


def measure(
    bundle: Bundle, cells: Sequence[Cell], options: Namespace
) -> tuple[list[Row], list[float]]:
    """Rows, and the bandwidths seen on the way, in bytes per second."""
    workers = {name: Worker(name, bundle, options.threads) for name in options.peers}
    rows: list[Row] = []
    bandwidths: list[float] = []
    try:
        outcomes = check(workers, bundle, options)
        for cell in cells:
            names = [name for name in workers if cell.phase == "decode" or name in PREFILL_PEERS]
            found = {name: Row(name, **asdict(cell), outcome=outcomes[name]) for name in names}
            for number in range(options.rounds):
                bandwidths.append(read_bandwidth(options.threads))
                turn_about(workers, found, number, bundle.vocab_size, options)
            for name in names:
                workers[name].close()
            rows += found.values()
    finally:
        for worker in workers.values():
            worker.stop()
    return rows, bandwidths


def check(workers: Mapping[str, Worker], bundle: Bundle, options: Namespace) -> dict[str, str]:
    """Outcome by peer: `ok`, or what is wrong with its logits."""
    from peers.executor import ExecutorPeer

    vocab = bundle.vocab_size
    expected = check_logits(ExecutorPeer(bundle, options.threads, backend="torch"), vocab)
    outcomes = {}
    for name, worker in workers.items():
        try:
            got = worker.ask(check_logits, vocab)
        except Failed as error:
            outcomes[name] = str(error)
        else:
            difference = float(np.abs(got - expected[: len(got)]).max())
            right = difference <= ALLOWED  # which nan is not
            outcomes[name] = "ok" if right else f"WRONG: max difference {difference:.1e}"
            print(f"check {name}: max difference {difference:.1e}", file=sys.stderr)
        if options.one_at_a_time or outcomes[name] != "ok":
            worker.stop()
    return outcomes


def turn_about(
    workers: Mapping[str, Worker],
    rows: Mapping[str, Row],
    number: int,
    vocab: int,
    options: Namespace,
) -> None:
    """One round of a cell: a turn of every peer that can run it, none of them always first."""
    names = [name for name, row in rows.items() if row.outcome == "ok"]
    first = number % max(len(names), 1)
    for name in names[first:] + names[:first]:
        row, worker = rows[name], workers[name]
        try:
            worker.open(row.cell, options.steps, options.rounds)
            times, peak = worker.ask(time_round, row.cell, options.steps, vocab)
        except Failed as error:
            row.outcome = shown = str(error)
            worker.close()
        else:
            row.round_ms.append(statistics.median(times))
            row.peak_rss_bytes = max(peak, row.peak_rss_bytes or 0)
            shown = f"{row.round_ms[-1]:.2f} ms"
        if options.one_at_a_time:
            worker.stop()
        print(f"{row.cell.name}, round {number + 1}, {name}: {shown}", file=sys.stderr)
