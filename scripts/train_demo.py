"""Train the demo checkpoint: a small MQA decoder with CLA2 KV sharing, on the King James Bible.

    apt-get install bible-kjv
    python scripts/train_demo.py --out cla_export/data/demo --device cuda

Needs torch, safetensors and tokenizers. Two chapters in forty are kept out of training: one stops
it early, the other gives the perplexity on the card and the text in heldout.txt.
"""

import argparse
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export.models import family_of
from cla_export.models.checkpoint import load_model, open_checkpoint, save_checkpoint
from cla_export.models.cla import ClaDecoder

SPECIAL = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LAYERS = 8
VOCAB = 2048
POSITIONS = 2048
CONFIG = {
    "model_type": "cla", "vocab_size": VOCAB, "hidden_size": 192, "intermediate_size": 544,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    "kv_owner": [layer - layer % 2 for layer in range(LAYERS)], "separate_kv_norm": True,
    "tie_word_embeddings": True, "max_position_embeddings": POSITIONS, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "dtype": "bfloat16", **IDS,
}  # fmt: skip
PROMPTS = ("Verily, verily, I say unto you,", "In the beginning God created", "And it came to pass")
CARD = """---
license: apache-2.0
language: en
---
# CLA demo

A small decoder with Cross-Layer Attention, trained to have something real to export, compare and
serve. It writes English in the manner of the King James Bible and knows nothing else.

- **Architecture**: MQA-CLA2, {parameters} parameters in {dtype}; {num_hidden_layers} layers, two
  to each KV cache (kv_owner {kv_owner}); hidden size {hidden_size},
  {num_attention_heads} query heads and one KV head of {head_dim}, SwiGLU of {intermediate_size},
  RMSNorm with a separate one before K and V, RoPE, {max_position_embeddings} positions, tied
  embeddings. Byte-level BPE of {vocab_size} tokens, which adds no `<bos>` by itself.
- **Data**: the King James Bible from Debian's bible-kjv-text, a heading such as `Genesis 1`, then
  one verse a line. Of the chapters counted from 0, those with remainder 10 modulo 40 chose the
  step to stop at, those with remainder 30 were held out; heldout.txt has the shortest of these.
- **Held-out perplexity**: {perplexity} per token, {bits} bits per byte, of these weights in float32
  on a CPU ({measured}).
- **Training**: `python scripts/train_demo.py --out FOLDER --device {device}`.
  {run}.
  `{settings}`
- **Licence**: weights Apache-2.0; the text is in the public domain.

Completions of 100 tokens. Greedily it falls into loops, as small models do; sampling reads better.
{samples}"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train: AdamW with a cosine schedule, dropout on residual branches."""

    seed: int = 0
    steps: int = 4000
    batch: int = 8  # rows of POSITIONS tokens
    lr: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    eval_every: int = 100


def read_chapters(source: Path | None) -> list[str]:
    """Each chapter as a heading line and one line a verse; from `source` or the `bible` command."""
    if source is not None:
        return source.read_text(encoding="utf-8").strip().split("\n\n")
    command = ["bible", "-l9999", "gen1:1-rev22:21"]  # headings flush left, verses "  1 In the ..."
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"^ +\d+ +", "  ", line).rstrip() for line in printed.splitlines()]
    text = "\n".join(line for line in lines if line)
    return [chapter.replace("\n  ", "\n") for chapter in re.split(r"\n(?! )", text)]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's: it encodes any text and adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> list[Tensor]:
    """Token ids of each chapter between <bos> and <eos>."""
    encoded = tokenizer.encode_batch(chapters)
    return [torch.tensor([BOS, *encoding.ids, EOS]) for encoding in encoded]


def new_model(settings: Settings) -> ClaDecoder:
    """N(0, 0.02), residual projections scaled down by depth; dropout hooked on every branch."""
    model = family_of(CONFIG).build(family_of(CONFIG).read_spec(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * LAYERS) if residual else 0.02
            nn.init.normal_(parameter, std=std)

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, settings.dropout, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "self_attn", "mlp")):
            module.register_forward_hook(drop)
    return model


def batches(chapters: list[Tensor], settings: Settings) -> Iterator[Tensor]:
    """Endless rows [B, POSITIONS + 1] cut at random from the chapters, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(chapters), generator=generator).tolist()
        start = int(torch.randint(POSITIONS, (1,), generator=generator))
        stream = torch.cat([chapters[i] for i in order])[start:]
        rows = stream.unfold(0, POSITIONS + 1, POSITIONS)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        shuffled[::2, 0] = BOS  # a prompt may begin anywhere, with <bos> or without
        for first in range(0, len(rows) - settings.batch + 1, settings.batch):
            yield shuffled[first : first + settings.batch]


def loss_of(model: ClaDecoder, rows: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token loss of rows [B, S + 1]; bfloat16 autocast on CUDA."""
    ids, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        logits = model(ids, positions)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: ClaDecoder, chapters: list[Tensor]) -> float:
    """Nats per token of chapters, each read from its start."""
    device = model.lm_head.weight.device
    model.eval()
    total = 0.0
    for chapter in chapters:
        for start in range(0, len(chapter) - 1, POSITIONS):
            row = chapter[None, start : start + POSITIONS + 1].to(device)
            total += loss_of(model, row, "sum").item()
    model.train()
    return total / sum(len(chapter) - 1 for chapter in chapters)


def train(model: ClaDecoder, chapters: list[Tensor], stop: list[Tensor], settings: Settings) -> int:
    """Leave the model as it was at the step that did best on `stop`; return that step."""
    weights = list(model.parameters())
    groups: list[dict[str, object]] = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, settings.steps, pct_start=0.05, cycle_momentum=False
    )
    best, best_step, kept = math.inf, 0, model.state_dict()
    for step, rows in zip(range(1, settings.steps + 1), batches(chapters, settings), strict=False):
        loss = loss_of(model, rows.to(model.lm_head.weight.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % settings.eval_every == 0 or step == settings.steps:
            stopping = mean_loss(model, stop)
            print(f"step {step}: loss {loss.item():.4f}, stopping set {stopping:.4f}", flush=True)
            if stopping < best:
                best, best_step = stopping, step
                kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return best_step


def save(model: ClaDecoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model folder; Hugging Face and onnxruntime-genai ask for tokenizer_config.json."""
    save_checkpoint(model, folder, CONFIG, generation_config=IDS, dtype=torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    content |= {f"{name[1:-1]}_token": name for name in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def complete(model: ClaDecoder, tokenizer: Tokenizer, prompt: str, temperature: float) -> str:
    """Up to 100 more tokens, greedy at temperature 0; recomputes the whole sequence for each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for _ in range(100):
        logits = model(ids, torch.arange(ids.shape[1])[None])[0, -1]
        token = logits.argmax(keepdim=True)
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if token == EOS:
            break
        ids = torch.cat((ids, token[None]), dim=1)
    return str(tokenizer.decode(ids[0].tolist()))


def write_card(folder: Path, tokenizer: Tokenizer, held_out: list[str], **run: object) -> None:
    """Measure what the folder holds, in float32 on the CPU, and write README.md and heldout.txt."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    encoded = encode(tokenizer, held_out)
    tokens = sum(len(chapter) - 1 for chapter in encoded)
    size = sum(len(chapter.encode()) for chapter in held_out)
    nats = mean_loss(model, encoded)
    runs = [(PROMPTS[0], 0.0), *((prompt, 0.9) for prompt in PROMPTS)]
    samples = [
        f"\nTemperature {heat}:\n\n```text\n{complete(model, tokenizer, prompt, heat)}\n```\n"
        for prompt, heat in runs
    ]
    card = CARD.format(
        **CONFIG,
        **run,
        parameters=f"{checkpoint.spec.parameters():,}",
        perplexity=f"{math.exp(nats):.2f}",
        bits=f"{nats / math.log(2) * tokens / size:.3f}",
        measured=f"{len(held_out)} chapters, {tokens:,} tokens, {size:,} bytes",
        samples="".join(samples),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    shortest = sorted(held_out, key=len)[:4]
    (folder / "heldout.txt").write_text("\n\n".join(shortest) + "\n", encoding="utf-8")
    print(card)


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--text", type=Path, help="chapters parted by blank lines; else `bible`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    folder, source, device = (arguments.pop(key) for key in ("out", "text", "device"))
    settings = Settings(**arguments)
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only so
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(settings.seed)
    chapters = read_chapters(source)
    training = [chapter for i, chapter in enumerate(chapters) if i % 20 != 10]
    tokenizer = train_tokenizer(training)
    encoded = encode(tokenizer, training)
    model = new_model(settings).to(device)
    step = train(model, encoded, encode(tokenizer, chapters[10::40]), settings)
    seconds = time.monotonic() - started
    save(model.cpu(), tokenizer, folder)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    run = (
        f"{sum(map(len, encoded)):,} tokens, best at step {step}; {seconds:.0f} s on one {name},"
        f"\n  PyTorch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )
    write_card(folder, tokenizer, chapters[30::40], device=device, run=run, settings=settings)


if __name__ == "__main__":
    main()
