"""Time and memory of exporting a large model and building TensorRT-RTX engines from it, on a CPU.

    python scripts/bench_build.py                         1.1 B parameters, float16, for 8.9
    python scripts/bench_build.py --layers 4 --keep DIR   a quick look; keeps what was made

Weights are random; each step runs in processes of its own, and its memory is their peak. Engines
are built, not run.
"""

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from random_model import make_model
from timed_command import cla_export

from cla_export.environment import processor
from cla_export.layout import uniform

CONFIG = {  # a 1.1 B Llama's widths
    "model_type": "cla",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for everything made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        owners = list(uniform(options.layers, 2))
        config = {**CONFIG, "num_hidden_layers": options.layers, "kv_owner": owners}
        source = folder / "model"
        count = make_model(source, config, torch.float16).spec.parameters()
        print(f"{count / 1e9:.2f} B parameters, {options.layers} layers, CLA2, GQA 32/4, float16")
        print(f"{date.today()}, {os.cpu_count()} x {processor()}; `python {' '.join(sys.argv)}`\n")
        print("| step | seconds | peak MiB | result MiB |")
        print("|---|---|---|---|")
        for attention in ("native", "plugin"):
            bundle = folder / attention
            target = ["--target", "tensorrt-rtx", "--dtype", "fp16", "--attention", attention]
            seconds, peak, _ = cla_export("export", str(source), str(bundle), *target, "--force")
            written = sum(path.stat().st_size for path in bundle.iterdir())
            row(f"export, {attention}", seconds, peak, written)
            limits = ["--capacity", str(options.capacity), "--compute-capability"]
            seconds, peak, found = cla_export(
                "build", str(bundle), *limits, options.compute_capability, "--force"
            )
            row(f"build, {attention}", seconds, max(peak, found["peak_bytes"]),
                found["engine"]["bytes"])  # fmt: skip
    return 0


def row(what: str, seconds: float, peak: int, result: int) -> None:
    print(f"| {what} | {seconds:.0f} | {peak / 2**20:,.0f} | {result / 2**20:,.0f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
