"""Compare many correct bundles and print how many the gate refuses, and how close the rest come.

    python scripts/false_alarms.py [--runs N] [--jobs N] [--markdown FILE]

Every run has its own weights, prompts, shapes of batches and chunks, layout, row length, threads
and target. bfloat16 is left out: ONNX Runtime's CPU provider has no kernels for it. Exit code 1 if
there is any false alarm.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/gate")]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: its largest shares by largest error, mean error, perplexity, and inside layers."""

    about: str
    passed: bool
    shares: tuple[float, float, float, float]


DTYPES = ("fp32", "fp16", "int8", "int4", "fp32+kv8", "int8+kv8", "int4+kv8")  # kv8: int8 caches


def batch(dtype: str, seeds: list[int]) -> list[Trial]:
    """Largest shares of what is allowed, and whether it passed, for each seed."""
    import correct
    from models_zoo import Zoo

    results = []
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        for seed in seeds:
            trial = correct.Trial(seed, dtype)
            report = trial.run(zoo)
            largest = max(r.max_error / r.tolerance for r in report.tensors)
            mean = max(r.mean_error / r.mean_tolerance for r in report.tensors)
            score = report.perplexity
            assert score is not None
            assert report.inside is not None
            shares = (largest, mean, score.difference / score.tolerance, report.inside)
            results.append(Trial(str(trial), report.passed, shares))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="of each dtype")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="some of these")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    start = time.monotonic()
    seeds = list(range(options.first, options.first + options.runs))
    lines = [
        "Shares are of what is allowed: 1 would be a false alarm.",
        "",
        "| dtype | runs | false alarms | largest error | mean error | perplexity | inside layers |",
        "|---|---|---|---|---|---|---|",
    ]
    alarms = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for dtype in options.dtypes.split(","):
            # layouts are traced once a process, so each process keeps to its own
            parts = [seeds[i :: options.jobs] for i in range(options.jobs)]
            futures = [pool.submit(batch, dtype, part) for part in parts if part]
            trials = [trial for future in futures for trial in future.result()]
            refused = [trial for trial in trials if not trial.passed]
            alarms += len(refused)
            worst = (max(shares) for shares in zip(*(t.shares for t in trials), strict=True))
            cells = " | ".join(f"{share:.2f}" for share in worst)
            lines.append(f"| {dtype} | {len(trials)} | {len(refused)} | {cells} |")
            print("\n".join([lines[-1], *(f"  refused: {trial.about}" for trial in refused)]))
            sys.stdout.flush()
    table = "\n".join(lines)
    print(table)
    print(f"{time.monotonic() - start:.0f} s")
    if options.markdown is not None:
        options.markdown.write_text(table + "\n", encoding="utf-8")
    return int(alarms > 0)


if __name__ == "__main__":
    raise SystemExit(main())
