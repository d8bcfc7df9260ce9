"""Compare many correct bundles and print how many the gate refuses, and how close the rest come.

    python scripts/false_alarms.py [--runs N] [--jobs N]

Every run has its own weights, prompts, layout, row length, threads and target; half are float32
and half float16. Exit code 1 if there is any false alarm.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/gate")]


def batch(dtype: str, seeds: list[int]) -> list[tuple[float, bool, str]]:
    """Share of the tolerance used, whether it passed, and the trial, for each seed."""
    from correct import Trial, worst_share
    from models_zoo import Zoo

    results = []
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        for seed in seeds:
            trial = Trial(seed, dtype)
            report = trial.run(zoo)
            results.append((worst_share(report), report.passed, str(trial)))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    start = time.monotonic()
    alarms = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for dtype in ("fp32", "fp16"):
            seeds = list(range(options.runs // 2))
            # layouts are traced once a process, so each process keeps to its own
            parts = [seeds[i :: options.jobs] for i in range(options.jobs)]
            futures = [pool.submit(batch, dtype, part) for part in parts if part]
            results = [result for future in futures for result in future.result()]
            refused = [trial for _, passed, trial in results if not passed]
            alarms += len(refused)
            shares = sorted((share for share, _, _ in results), reverse=True)
            print(
                f"{dtype}: {len(refused)} false alarms in {len(results)} runs; error over "
                f"tolerance at most {shares[0]:.2f} ({max(results)[2]}), median "
                f"{shares[len(shares) // 2]:.2f}"
            )
            print("\n".join(f"  refused: {trial}" for trial in refused), end="")
    print(f"{time.monotonic() - start:.0f} s")
    return int(alarms > 0)


if __name__ == "__main__":
    raise SystemExit(main())
