"""Write the goldens under graphs/, or check that they are what the code makes now.

    python scripts/regen_graphs.py                          write all of them
    python scripts/regen_graphs.py --check                  compare; show differences and exit 1
    python scripts/regen_graphs.py --only 'passes/*'        these alone

`graphs/README.md` says what is written and what is maintained by hand.
"""

import argparse
import sys
import tomllib
from difflib import unified_diff
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from pass_examples import after, normalised

from cla_export.graph_text import to_text
from cla_export.lower import CPU, CUDA, lower
from cla_export.lower.fuse_products import fuse_products
from cla_export.lower.linears import read_weights_in_place
from cla_export.models import family_of
from cla_export.rewrite import rewrite

GRAPHS = Path(__file__).resolve().parents[1] / "graphs"
TARGETS = {  # by what they are traced in
    "float32": ("onnxruntime", CPU),
    "float16": (CUDA, "tensorrt"),
}
STAGES = ("canonical", *(target for targets in TARGETS.values() for target in targets))
DIFF_LINES = 40  # of each file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--only", default="*", metavar="GLOB", help="paths below graphs/")
    parser.add_argument("--graphs", type=Path, default=GRAPHS, help="folder (default: graphs/)")
    args = parser.parse_args()
    made = generate(args.graphs, args.only)
    stale = sorted(set(existing(args.graphs, args.only)) - set(made))
    if not made and not stale:
        parser.error(f"--only {args.only!r} matches no golden")
    if args.check:
        return check(args.graphs, made, stale)
    write(args.graphs, made, stale)
    return 0


def generate(graphs: Path, only: str = "*") -> dict[str, str]:
    """Path below graphs/ -> text, of every golden whose path matches `only`."""
    made: dict[str, str] = {}
    layouts = tomllib.loads((graphs / "onnx/layouts.toml").read_text(encoding="utf-8"))
    defaults = layouts.pop("defaults")
    for name, config in layouts.items():
        if any(fnmatchcase(golden_of(name, stage), only) for stage in STAGES):
            made |= layout_goldens(name, defaults | config)  # a trace takes seconds
    for path in sorted((graphs / "passes").glob("*/before.onnxtxt")):
        example, before = path.parent.name, path.read_text(encoding="utf-8")
        made[f"passes/{example}/before.onnxtxt"] = normalised(before)
        made[f"passes/{example}/after.onnxtxt"] = after(example, before)
    return {name: text for name, text in made.items() if fnmatchcase(name, only)}


def existing(graphs: Path, only: str) -> list[str]:
    names = (path.relative_to(graphs).as_posix() for path in graphs.rglob("*.onnxtxt"))
    return [name for name in names if fnmatchcase(name, only)]


def golden_of(layout: str, stage: str) -> str:
    return f"onnx/{layout}.{stage}.onnxtxt"


def layout_goldens(name: str, config: dict[str, object]) -> dict[str, str]:
    """The canonical and the lowered graph of one tiny model. No weights are made for it."""
    import torch

    from cla_export.trace import trace

    family = family_of(config)
    spec = family.read_spec(config)
    title = f"{spec.layout.describe()}; kv_owner {list(spec.layout.kv_owner)}"
    made = {}
    for dtype, targets in TARGETS.items():
        canonical = rewrite(trace(family, spec, getattr(torch, dtype)), spec.layout)
        if "onnxruntime" in targets:
            text = to_text(canonical.model, [f"{name}, canonical: {title}"])
            made[golden_of(name, "canonical")] = text
        for target in targets:
            lowered = lower(target, canonical.model, spec.layout)
            if target == CPU:
                if "ClaAttention" not in lowered.attention:
                    continue  # its head dim is too small, and a bundle has no such graph
                read_weights_in_place(lowered.model)
            elif target == CUDA:
                fuse_products(lowered.model)
            groups = [
                f"group {index}: {operator} ({why})"
                for index, (operator, why) in enumerate(
                    zip(lowered.attention, lowered.reasons, strict=True)
                )
            ]
            heading = f"{name}, for {target}: {title}"
            made[golden_of(name, target)] = to_text(lowered.model, [heading, *groups])
    return made


def check(graphs: Path, made: dict[str, str], stale: list[str]) -> int:
    """Print how the goldens differ from what was made; 1 if they do."""
    problems = 0
    for name, text in made.items():
        path = graphs / name
        old = path.read_text(encoding="utf-8") if path.is_file() else None
        if old == text:
            continue
        problems += 1
        if old is None:
            print(f"missing: {name}")
            continue
        diff = unified_diff(
            old.splitlines(),
            text.splitlines(),
            f"graphs/{name}",
            "what the code makes",
            lineterm="",
            n=1,
        )
        print(f"differs: {name}", *islice(diff, DIFF_LINES), sep="\n")
        more = sum(1 for _ in diff)
        if more:
            print(f"... {more} more lines")
    for name in stale:
        print(f"stale: {name} (nothing makes it any more)")
    problems += len(stale)
    if problems:
        print(f"\n{problems} of {len(made) + len(stale)} goldens are not what the code makes.")
        print("If that is meant, run scripts/regen_graphs.py and review the difference in git.")
    else:
        print(f"{len(made)} goldens are what the code makes.")
    return int(problems > 0)


def write(graphs: Path, made: dict[str, str], stale: list[str]) -> None:
    for name, text in made.items():
        path = graphs / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    for name in stale:
        (graphs / name).unlink()
        print(f"removed {name}")


if __name__ == "__main__":
    sys.exit(main())
