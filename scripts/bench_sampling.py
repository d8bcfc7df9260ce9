"""What choosing tokens costs: milliseconds of processor time a step, median.

    python scripts/bench_sampling.py

Logits are normal numbers: of deviation 4, about as peaked as a trained model's, and of 0.5, where
nearly all tokens are likely. Penalties are of 500 tokens of prompt and 200 made.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from provenance import heading, provenance

from cla_export.sampling import Sampler, SamplingParams, choose
from cla_export.serve.logprobs import logprob_of

KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_p 0.5": SamplingParams(temperature=0.8, top_p=0.5),
    "top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "all three": SamplingParams(temperature=0.8, top_k=50, min_p=0.02, top_p=0.95),
    "top_p, penalties": SamplingParams(
        temperature=0.8, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.1
    ),
}
LOGPROBS = "top 5 logprobs"  # beside whatever is chosen


def milliseconds(step: Callable[[], object], times: int) -> float:
    """Median of the processor's time."""
    taken = []
    for _ in range(times + 2):
        began = time.thread_time()
        step()
        taken.append(time.thread_time() - began)
    return float(np.median(taken[2:])) * 1e3


def costs(rows: int, vocab: int, deviation: float, times: int) -> dict[str, float]:
    """By kind."""
    random = np.random.default_rng(0)
    logits = (random.standard_normal((rows, vocab)) * deviation).astype(np.float32)
    found = {}
    for name, params in KINDS.items():
        samplers = [
            Sampler(params, prompt=random.integers(0, vocab, 500).tolist()) for _ in range(rows)
        ]
        for sampler in samplers:
            for token in random.integers(0, vocab, 200).tolist():
                sampler.take(token)
        found[name] = milliseconds(lambda made=samplers: choose(logits, made), times)
    found[LOGPROBS] = milliseconds(lambda: [logprob_of(row, 5, 5) for row in logits], times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--vocab", default="32000,152000")
    parser.add_argument("--times", type=int, default=20)
    given = parser.parse_args()
    print(heading(provenance(1)))
    print(f"| vocabulary | logits | rows | {' | '.join([*KINDS, LOGPROBS])} |")
    print("|---" * (4 + len(KINDS)) + "|")
    for vocab in map(int, given.vocab.split(",")):
        for shape, deviation in (("peaked", 4.0), ("flat", 0.5)):
            for rows in map(int, given.rows.split(",")):
                found = costs(rows, vocab, deviation, given.times)
                cells = " | ".join(f"{ms:.2f}" for ms in found.values())
                print(f"| {vocab:,} | {shape} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
