"""Export and prove every sharing pattern x head kind x attention; print the README's table.

python scripts/parity_matrix.py            # 60 tiny models with random weights, about 12 minutes
python scripts/parity_matrix.py --target portable --only CLA2
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models_zoo import HEADS, PATTERNS, make_checkpoint

import cla_export
from cla_export.compare.report import ParityReport

WINDOW = 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--only", default="", help="patterns whose name contains this")
    arguments = parser.parse_args()
    print("| sharing | groups / layers | cache inputs | logit error | cache error | greedy |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for pattern in PATTERNS:
        if arguments.only not in pattern:
            continue
        reports = [
            prove(pattern, heads, window, arguments.target)
            for heads, window in product(HEADS, (None, WINDOW))
        ]
        owners = PATTERNS[pattern]
        groups = len(set(owners))
        logits, caches = (
            max(r.max_error for p in reports for r in p.tensors if (r.group is None) == is_logits)
            for is_logits in (True, False)
        )
        greedy = min(report.greedy_agreement for report in reports)
        failed += sum(not report.passed for report in reports)
        print(
            f"| {pattern} | {groups} / {len(owners)} | {2 * groups} | {logits:.1e} | "
            f"{caches:.1e} | {greedy:.0%} |",
            flush=True,
        )
    print(f"\n{failed} failed")
    return 1 if failed else 0


def prove(pattern: str, heads: str, window: int | None, target: str) -> ParityReport:
    """Export one random model and compare it with PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        source = make_checkpoint(
            Path(folder) / "model",
            kv_owner=PATTERNS[pattern],
            num_key_value_heads=HEADS[heads],
            sliding_window=window,
            max_position_embeddings=160,
        )
        bundle = cla_export.export(source, Path(folder) / "bundle", target=target)
        found = [name for name in bundle.manifest["inputs"] if name.startswith("past_key")]
        assert len(found) == 2 * bundle.layout.num_groups, found
        return cla_export.parity(bundle)


if __name__ == "__main__":
    sys.exit(main())
