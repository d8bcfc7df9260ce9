"""Decode and prefill on one CPU: a bundle beside what people would use instead of it.

    python scripts/bench_peers.py                              a model with random weights
    python scripts/bench_peers.py MODEL --batch 1,8 --context 512,8192 --json OUT.json
    python scripts/bench_peers.py --layers 4 --context 512 --peers bundle,stock    a quick look

All peers have the same weights and, but for genai, which reads a prompt instead, the same made-up
keys and values in their caches. Each lives in a process of its own, so that its peak memory is its
own, and only one computes at a time. Before anything is timed, each decodes the same tokens as
the model's PyTorch module: whoever is off by more than 0.001 is WRONG and not timed.

A cell is a batch and a context; its rounds go through all peers in turn, so that noise hits all
alike. A step is greedy, from tokens to next tokens, and a number is the median over rounds of the
median step. The floor is the time that memory takes to deliver the weights and, once for each
group, the valid keys and values; its bandwidth is read between rounds.

    bundle             our export, as its executor runs it
    stock              the same weights with ONNX Runtime's GroupQueryAttention, in place
    torch eager        PyTorch over caches per group, query heads of a kv head folded, in place
    torch compile      the same, compiled for each cell
    torch frozen       the same, with the weights packed by the compiler; not run by default
    per-layer Concat   ONNX, a cache for each layer that grows by Concat: Attention on its present
    per-group Concat   the same with a cache for each group
    genai              onnxruntime-genai on the bundle's folder
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peers import EXTRA_PEERS, PEERS, prepare_peer
from peers.cells import Cell
from peers.measure import measure
from peers.report import conclude, markdown, summary
from peers.timing import CHECK_POSITIONS, WARM
from random_model import add_shape_options, config_of, make_model

from cla_export.bundle import Bundle, write_json
from cla_export.spec import ModelSpec


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--peers", type=peer_names, metavar="NAME,...")
    parser.add_argument("--batch", type=numbers, default=[1, 8], metavar="N,...")
    parser.add_argument("--context", type=numbers, default=[512, 8192], metavar="N,...")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill; 0 for none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    alone = "keep one peer's model in memory, loaded anew for every turn"
    parser.add_argument("--one-at-a-time", action="store_true", help=alone)
    parser.add_argument("--factor", type=int, default=2, metavar="N", help="layers that share")
    add_shape_options(parser)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by the peers as they load
    options.peers = options.peers or [name for name in PEERS if name not in EXTRA_PEERS]
    cells = [
        Cell("decode", batch, context) for batch in options.batch for context in options.context
    ]
    if options.prompt:
        cells.append(Cell("prefill", 1, options.prompt))
    with tempfile.TemporaryDirectory() as scratch:
        bundle, spec = prepare(options, cells, Path(scratch))
        rows, bandwidths = measure(bundle, cells, options)
    for row in rows:
        conclude(row, spec, statistics.median(bandwidths))
    run = summary(spec, rows, bandwidths, options.threads)
    text = markdown(run, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, run)
    return int(any(row.outcome.startswith("WRONG") for row in rows))


def prepare(
    options: argparse.Namespace, cells: Sequence[Cell], scratch: Path
) -> tuple[Bundle, ModelSpec]:
    """Export the model to a bundle in `scratch`, and write what other peers need beside it."""
    from cla_export.exporter import export
    from cla_export.models.checkpoint import open_checkpoint

    steps = options.rounds * (WARM + options.steps)
    positions = max(CHECK_POSITIONS, *(cell.capacity(steps) for cell in cells))
    source = options.model
    if source is None:
        source = scratch / "model"
        make_model(source, config_of(options, options.factor, positions))
    bundle = export(source, scratch / "bundle")
    if bundle.max_positions < positions:
        raise SystemExit(f"{source}: {bundle.max_positions} positions; the cells take {positions}")
    for name in options.peers:
        prepare_peer(name, bundle)
    return bundle, open_checkpoint(source).spec


def numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def peer_names(text: str) -> list[str]:
    known = {plain(name): name for name in PEERS}
    try:
        return [known[plain(name)] for name in text.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(
            f"no peer is called {error}; expected some of {', '.join(PEERS)}"
        ) from error


def plain(name: str) -> str:
    return name.strip().lower().replace("-", " ")


if __name__ == "__main__":
    sys.exit(main())
