"""Draw what bench_attention.py measured: the share of the read ceiling, cell by cell.

python scripts/plot_attention.py tests/gpu/attention_h200_float16.json tests/gpu/attention_h200.svg
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

LOOKS = {  # marker, colour, size; in the legend's order
    "ClaAttention": ("D", "#c2410c", 52),
    "SDPA": ("o", "#1d4ed8", 34),
    "SDPA cuDNN": ("x", "#60a5fa", 34),
    "flex": ("^", "#6b7280", 34),
    "GQA owner": ("s", "#15803d", 30),
    "GQA owner, no XQA": ("+", "#15803d", 46),
    "GQA sharer": ("s", "#86efac", 30),
}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    names = list(run["cells"])[::-1]
    mpl.rcParams["svg.hashsalt"] = "attention"
    figure = Figure(figsize=(9.2, 8.2), layout="constrained")
    axes = figure.add_subplot()
    for contender, (marker, color, size) in LOOKS.items():
        points = [
            (cell["bytes"] / cell["us"][contender] / 1e3 / run["ceiling"], place)
            for place, cell in enumerate(run["cells"][name] for name in names)
            if contender in cell["us"]
        ]
        if not points:
            continue
        shares, places = zip(*points, strict=True)
        axes.scatter(
            shares, places, marker=marker, c=color, s=size, label=contender,
            zorder=4 if contender == "ClaAttention" else 3,
        )  # fmt: skip
    labels = [f"{name}   {run['cells'][name]['bytes'] / 1e6:,.0f} MB" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel(f"share of the read ceiling, {run['ceiling']:,.0f} GB/s (right is faster)")
    axes.set_title(
        f"One decode-attention node: {run['gpu']}, {run['dtype']}, head dim 128, {run['date']}\n"
        "query/kv heads, rows x context, keys and values read",
        fontsize=11,
        loc="left",
    )
    axes.grid(axis="x", color="#e5e7eb")
    for place in range(len(names)):
        axes.axhline(place, color="#f3f4f6", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(sys.argv[2], metadata={"Date": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
