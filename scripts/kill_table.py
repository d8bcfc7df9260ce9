"""Run every mutant on every layout and print which the gate kills, by what and where.

    python scripts/kill_table.py [--markdown FILE] [--only WORD] [--jobs N]

Exit code 1 if any mutant survives or is found in the wrong place.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/gate")]


@dataclass(frozen=True, slots=True)
class Cell:
    """One mutant on one layout."""

    mutant: str
    layout: str
    text: str
    verdict: str  # killed, survived, misplaced, error, not applicable
    problem: str = ""


def judge(name: str, layout: str, zoo_folder: str) -> Cell:
    import torch
    from models_zoo import Zoo
    from mutants import LAYOUTS, MUTANTS, run

    torch.set_num_threads(1)
    bundle = Zoo(Path(zoo_folder)).bundle(**LAYOUTS[layout])
    mutant = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = run(mutant, bundle, Path(folder))
        except Exception as error:  # the table must be printed to its end
            return Cell(name, layout, "error", "error", f"{type(error).__name__}: {error}")
    if outcome is None:
        return Cell(name, layout, "-", "not applicable")
    problem = outcome.problem()
    if problem is not None and outcome.invisible is not None:
        return Cell(name, layout, "equivalent", "equivalent", outcome.invisible)
    if problem == "survived":
        return Cell(name, layout, "**survived**", problem, problem)
    text = f"{outcome.case}; {outcome.found}"
    if problem is not None:
        return Cell(name, layout, f"**misplaced** {text}", "misplaced", problem)
    return Cell(name, layout, text, "killed")


def run_all(names: list[str], layouts: list[str], jobs: int) -> list[Cell]:
    from models_zoo import Zoo
    from mutants import LAYOUTS

    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        for layout in layouts:
            zoo.bundle(**LAYOUTS[layout])
        pairs = [(name, layout) for name in names for layout in layouts]
        cells = []
        with ProcessPoolExecutor(jobs) as pool:
            futures = [pool.submit(judge, *pair, folder) for pair in pairs]
            for done, future in enumerate(futures, 1):
                cells.append(cell := future.result())
                if cell.problem and cell.verdict != "equivalent":
                    print(f"{cell.mutant} on {cell.layout}: {cell.problem}", file=sys.stderr)
                if done % 50 == 0:
                    print(f"{done} of {len(pairs)}", file=sys.stderr)
        return cells


def to_markdown(cells: list[Cell], layouts: list[str]) -> str:
    by_pair = {(cell.mutant, cell.layout): cell for cell in cells}
    names = list(dict.fromkeys(cell.mutant for cell in cells))
    lines = [
        "A cell says which case fails first, and where the gate says the fault is.",
        "",
        "| mutant | " + " | ".join(layouts) + " |",
        "|---" * (len(layouts) + 1) + "|",
    ]
    for name in names:
        row = [by_pair[name, layout].text for layout in layouts]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", totals(cells)])


def totals(cells: list[Cell]) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell.verdict] = counts.get(cell.verdict, 0) + 1
    kinds = len({cell.mutant for cell in cells})
    listed = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    return f"{kinds} kinds on {len({cell.layout for cell in cells})} layouts: {listed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--layout", default="", help="layouts whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    from mutants import LAYOUTS, MUTANTS

    names = [name for name in MUTANTS if options.only in name]
    layouts = [name for name in LAYOUTS if options.layout in name]
    start = time.monotonic()
    cells = run_all(names, layouts, options.jobs)
    table = to_markdown(cells, layouts)
    print(table)
    print(f"{time.monotonic() - start:.0f} s")
    if options.markdown is not None:
        options.markdown.write_text(table + "\n", encoding="utf-8")
    return int(any(cell.verdict in ("survived", "misplaced", "error") for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
