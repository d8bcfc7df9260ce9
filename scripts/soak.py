"""Random requests against a running server, each compared with what it gives alone.

Arrivals, lengths, prefixes, seeds, parameters and cancellations are random but repeatable. Every
answer must be, token for token, the one that the same request gets from an idle server; afterwards
every slot must be free, and the server's counters must add up: exactly to the sum of all answers in
rounds in which nobody leaves early, and to what its steps made in all.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

Body = dict[str, Any]
_PATIENCE = 300  # seconds
_DECODED, _PREFILLED = (f'step_tokens_total{{phase="{phase}"}}' for phase in ("decode", "prefill"))
_SUCCESS = "request_success_total"


@dataclass(slots=True)
class Outcome:
    """What a soak found."""

    requests: int = 0
    same: int = 0
    cancelled: int = 0
    retried: int = 0  # answers 429
    tokens: int = 0
    cached: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def make_body(random: np.random.Generator, vocab: int) -> Body:
    """One request; some share their first tokens."""
    shared = np.random.default_rng(int(random.integers(3))).integers(3, vocab, 200)
    start = shared[: random.choice([0, 0, 40, 150])].tolist()
    prompt = start + random.integers(3, vocab, int(random.integers(1, 60))).tolist()
    body: Body = {
        "prompt": prompt,
        "max_tokens": int(random.integers(1, 50)),
        "seed": int(random.integers(2**40)),
        "temperature": float(random.choice([0.0, 0.0, 0.7, 1.2])),
        "return_token_ids": True,
    }
    options: list[Body] = [
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logit_bias": {str(int(random.integers(3, vocab))): 5.0}},
        {"stop": [" the", "and"]},
        {"min_tokens": 1},
        {"ignore_eos": True},
    ]
    for option in options:
        if random.random() < 0.2:
            body |= option
    return body


async def ask(client: httpx.AsyncClient, body: Body, outcome: Outcome) -> Body:
    """The answer's choice, with usage in it; waits and asks again where the queue is full."""
    while True:
        if body.get("stream"):
            answer = await _stream(client, body)
        else:
            response = await client.post("/v1/completions", json=body)
            answer = response.json() | {"status": response.status_code}
        if answer["status"] != 429:
            break
        outcome.retried += 1
        await asyncio.sleep(0.2)
    if answer["status"] != 200:
        raise RuntimeError(str(answer))
    return answer["choices"][0] | answer["usage"]


async def _stream(client: httpx.AsyncClient, body: Body) -> Body:
    """A streamed answer, put together."""
    whole: Body = {"text": "", "token_ids": [], "finish_reason": None}
    usage: Body = {}
    options = {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body | options) as response:
        if response.status_code != 200:
            return {"status": response.status_code, "text": (await response.aread()).decode()}
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event))
            usage = event["usage"] or usage
            for choice in event["choices"]:
                whole["text"] += choice["text"]
                whole["token_ids"] += choice["token_ids"]
                whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    return {"status": 200, "choices": [whole], "usage": usage}


async def soak(
    url: str, count: int, seed: int, *, alone_url: str | None = None, vocab: int = 2048,
    rate: float = 60.0, cancel: float = 0.15, headers: Mapping[str, str] | None = None,
) -> Outcome:  # fmt: skip
    """Run `count` requests that arrive `rate` a second, then each again by itself.

    `cancel` is the share that leaves early. `alone_url` is the server for those by themselves.
    """
    random, outcome = np.random.default_rng(seed), Outcome()
    bodies = [make_body(random, vocab) for _ in range(count)]
    arrivals = np.cumsum(random.exponential(1 / rate, count))
    leaves = [random.exponential(0.3) if random.random() < cancel else None for _ in bodies]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=_PATIENCE, limits=limits, headers=headers
    ) as client:
        before, began = await _counters(client), time.monotonic()

        async def one(index: int) -> Body | None:
            await asyncio.sleep(float(arrivals[index]))
            body = bodies[index] | {"stream": index % 2 == 0}
            try:
                return await asyncio.wait_for(ask(client, body, outcome), leaves[index])
            except TimeoutError:
                return None

        together = await asyncio.gather(*(one(index) for index in range(count)))
        outcome.seconds = time.monotonic() - began
        await _wait_idle(client, outcome)
        after = await _counters(client)
        answered = [answer for answer in together if answer is not None]
        outcome.tokens = sum(answer["completion_tokens"] for answer in answered)
        outcome.cached = sum(a["prompt_tokens_details"]["cached_tokens"] for a in answered)
        outcome.cancelled = count - len(answered)
        grown = {name: value - before.get(name, 0) for name, value in after.items()}
        outcome.faults += _account(grown, answered, everybody=not outcome.cancelled)
    async with httpx.AsyncClient(
        base_url=alone_url or url, timeout=_PATIENCE, headers=headers
    ) as client:
        for index, answer in enumerate(together):
            if answer is None:
                continue
            outcome.requests += 1
            expected = await ask(client, bodies[index], outcome)
            keys = ("token_ids", "text", "finish_reason", "completion_tokens", "prompt_tokens")
            differ = [key for key in keys if answer[key] != expected[key]]
            outcome.same += not differ
            if differ:
                at = _first_difference(answer["token_ids"], expected["token_ids"])
                outcome.faults.append(f"request {index}: {differ} differ, from token {at} on")
    return outcome


def _account(grown: Mapping[str, float], answers: Sequence[Body], *, everybody: bool) -> list[str]:
    """What does not add up in the counters' growth; `everybody`: all requests were answered."""
    made, first = grown["generation_tokens_total"], grown["time_to_first_token_seconds_count"]
    looked, found = grown["prefix_cache_queries_total"], grown["prefix_cache_hits_total"]
    pairs = {"tokens, and those of steps": (made, first + grown[_DECODED])}
    if everybody:
        asked = sum(answer["prompt_tokens"] for answer in answers)
        cached = sum(answer["prompt_tokens_details"]["cached_tokens"] for answer in answers)
        successes = [value for name, value in grown.items() if name.startswith(_SUCCESS)]
        pairs |= {
            "tokens, and those of answers": (made, sum(a["completion_tokens"] for a in answers)),
            "requests, and answers": (sum(successes), len(answers)),
            "prompt tokens, and those of answers": (grown["prompt_tokens_total"], asked),
            "prompt tokens looked up, and those of answers": (looked, asked),
            "prompt tokens cached, and those of answers": (found, cached),
            "prompt tokens not cached, and those of steps": (looked - found, grown[_PREFILLED]),
        }
    return [f"{what}: {a:.0f}, {b:.0f}" for what, (a, b) in pairs.items() if a != b]


def _first_difference(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


async def _counters(client: httpx.AsyncClient) -> dict[str, float]:
    found = {}
    for line in (await client.get("/metrics")).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.removeprefix("cla_export_")] = float(value)
    return found


async def _wait_idle(client: httpx.AsyncClient, outcome: Outcome) -> None:
    for _ in range(500):
        now = await _counters(client)
        if not now["num_requests_running"] + now["num_requests_waiting"]:
            if now["kv_cache_usage_perc"]:
                outcome.faults.append(f"cache in use when idle: {now['kv_cache_usage_perc']}")
            slots = (await client.get("/status")).json()["slots"]
            busy = [slot for slot in slots if slot["state"] not in ("kept", "free")]
            if busy or len(slots) != now["num_slots"]:
                outcome.faults.append(f"slots when idle: {slots}")
            return
        await asyncio.sleep(0.01)
    outcome.faults.append("not idle 5 s after the last answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=200, help="of one round")
    parser.add_argument("--minutes", type=float, default=0.0, help="repeat rounds for so long")
    parser.add_argument("--rate", type=float, default=60.0, help="arrivals a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="of the server: report its memory and files")
    given = parser.parse_args()
    ends, seed, faults = time.monotonic() + 60 * given.minutes, given.seed, 0
    while True:
        leave = 0.15 if seed % 2 else 0.0
        found = asyncio.run(soak(given.url, given.requests, seed, rate=given.rate, cancel=leave))
        faults += len(found.faults)
        print(
            f"seed {seed}: {found.same} of {found.requests} the same as alone, "
            f"{found.cancelled} left early, {found.tokens} tokens in {found.seconds:.1f} s "
            f"({found.tokens / found.seconds:.0f}/s), {found.cached} prompt tokens cached, "
            f"{found.retried} answers 429{_process(given.pid)}",
            *found.faults,
            sep="\n  ",
            flush=True,
        )
        seed += 1
        if time.monotonic() >= ends:
            sys.exit(1 if faults else 0)


def _process(pid: int | None) -> str:
    if pid is None:
        return ""
    from pathlib import Path

    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    rss = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return f"; RSS {int(rss) / 1024:.0f} MiB, {files} files"


if __name__ == "__main__":
    main()
