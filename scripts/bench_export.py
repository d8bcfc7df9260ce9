"""What an export costs, at 1 B and 3 B parameters, beside torch.onnx.export on the same weights.

    python scripts/bench_export.py                       both sizes, bfloat16 checkpoints
    python scripts/bench_export.py --sizes 1B --keep DIR one of them; keeps what was made

Each row is one command in a process of its own, from start to end: seconds, the most memory it had
resident (mapped files count), and the bytes that it wrote. Checkpoints have random weights in
shards of 2 GB, and are read once before the clock starts. torch.onnx.export traces the same module
at the same opset and writes a graph without caches. Results: tests/cpu/MEASURED.md.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from timed_command import cla_export, timed

from cla_export.environment import processor
from cla_export.layout import uniform
from cla_export.models import family_of

SIZES = {
    "1B": {"num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5472},
    "3B": {"num_hidden_layers": 32, "hidden_size": 3072, "intermediate_size": 8192},
}
COMMON = {
    "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 50304, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHARD = 2 << 30  # bytes
PEER = """
import sys
from pathlib import Path
import torch
from cla_export.models import family_of
from cla_export.models.checkpoint import open_checkpoint
from safetensors.torch import load_file
source, dest = map(Path, sys.argv[1:])
spec = open_checkpoint(source).spec
family = family_of(open_checkpoint(source).config)
with torch.device("meta"):
    module = family.build(spec).eval()
stored = {}
for shard in source.glob("*.safetensors"):
    stored |= load_file(shard)
module.load_state_dict(stored, assign=True, strict=False)
for name, value in family.constants(spec).items():
    parent, _, last = name.rpartition(".")
    module.get_submodule(parent).register_buffer(last, value, persistent=False)
ids = torch.zeros(2, 5, dtype=torch.int64)
positions = torch.arange(5).repeat(2, 1)
dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
dest.mkdir()
torch.onnx.export(
    module, (ids, positions), dest / "model.onnx", dynamo=True, opset_version=23,
    dynamic_shapes=(dynamic, dynamic), external_data=True, verbose=False,
    input_names=["input_ids", "position_ids"], output_names=["logits"],
)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="1B,3B", help="some of 1B,3B")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of the bundles; bf16 is as stored")
    parser.add_argument("--model-type", default="cla", choices=("cla", "llama"))
    parser.add_argument("--no-peer", action="store_true", help="without torch.onnx.export")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for everything made")
    options = parser.parse_args()
    print(f"{date.today()}, {os.cpu_count()} x {processor()}, PyTorch {torch.__version__};")
    print(f"`python {' '.join(sys.argv)}`\n")
    print("| parameters | export | seconds | peak MB resident | MB written |")
    print("|---|---|---|---|---|", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for size in options.sizes.split(","):
            source = folder / f"{options.model_type}-{size}"
            if not source.exists():
                make_checkpoint(source, size, options.model_type)
            config = config_of(size, options.model_type)
            parameters = family_of(config).read_spec(config).parameters()
            for what, seconds, peak, written in measure(source, folder, options):
                found.append([size, parameters, what, seconds, peak, written])
                print(
                    f"| {parameters / 1e9:.2f} B | {what} | {seconds:.1f} | {peak / 1e6:,.0f} "
                    f"| {written / 1e6:,.1f} |",
                    flush=True,
                )
    peaks = {size: peak for size, _, what, _, peak, _ in found if what.endswith("bf16")}
    if {"1B", "3B"} <= peaks.keys():
        print(f"\npeak of 3B over 1B, bf16: {peaks['3B'] / peaks['1B']:.2f}")
    if options.json is not None:
        keys = ("size", "parameters", "export", "seconds", "peak_bytes", "written_bytes")
        rows = [dict(zip(keys, row, strict=True)) for row in found]
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


def measure(
    source: Path, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, float, int, int]]:
    for dtype in options.dtypes.split(","):
        warm(source)
        dest = folder / "bundle"
        seconds, peak, made = cla_export(
            "export", str(source), str(dest), "--dtype", dtype, "--force"
        )
        own = [path for path in dest.iterdir() if path.name not in made.get("linked", [])]
        yield f"cla-export, {dtype}", seconds, peak, sum(path.stat().st_size for path in own)
        shutil.rmtree(dest)
    if not options.no_peer:
        warm(source)
        dest = folder / "peer"
        seconds, peak, _ = timed(sys.executable, "-c", PEER, str(source), str(dest))
        written = sum(path.stat().st_size for path in dest.iterdir())
        yield "torch.onnx.export, bfloat16", seconds, peak, written
        shutil.rmtree(dest)


def config_of(size: str, model_type: str) -> dict[str, object]:
    shape = SIZES[size]
    config = {"model_type": model_type, **COMMON, **shape}
    config["num_attention_heads"] = shape["hidden_size"] // 128
    if model_type == "cla":
        config["kv_owner"] = list(uniform(shape["num_hidden_layers"], 2))
    return config


def make_checkpoint(folder: Path, size: str, model_type: str) -> None:
    """Shards of random weights: a block of normal numbers, over and over."""
    config = config_of(size, model_type)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, held = {}, 0
    for name, shape in family_of(config).read_spec(config).weights().items():
        numbers = torch.Size(shape).numel()
        if held + 2 * numbers > SHARD:
            flush(folder, shards.pop(), weight_map)
            shards, held = [{}], 0
        repeated = block.repeat(-(-numbers // len(block)))[:numbers]
        shards[-1][name] = (
            repeated.view(shape).clone()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
        )
        held += 2 * numbers
    flush(folder, shards.pop(), weight_map)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def flush(folder: Path, tensors: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)


def warm(folder: Path) -> None:
    """Read all of a folder, so that the first command does not wait for the disk alone."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    raise SystemExit(main())
