"""What a peer is asked to do, in its process: to check its logits, and to time a cell."""

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np
from random_model import Floats, prompts

from cla_export.peak_memory import read_peak
from peers.cells import Cell
from peers.peer import Peer

CHECK_BATCH, CHECK_PROMPT = 2, 24
CHECK_POSITIONS = 2 * CHECK_PROMPT
WARM = 2  # steps before those that are timed
PREFILLS = 3  # prompts a round, the first of them untimed


def check_logits(peer: Peer, vocab: int) -> Floats:
    """Logits [N, B, V] after prompts, after the tokens they suggest, and behind made-up caches."""
    peer.start(CHECK_BATCH, CHECK_POSITIONS)
    found = [peer.prefill(prompts(CHECK_BATCH, CHECK_PROMPT, vocab)).copy()]
    found.append(peer.decode(found[0].argmax(-1).tolist(), CHECK_PROMPT).copy())
    if peer.fills:
        peer.start(CHECK_BATCH, CHECK_POSITIONS)
        peer.fill(CHECK_PROMPT)
        found.append(peer.decode([1] * CHECK_BATCH, CHECK_PROMPT).copy())
    peer.free()
    return np.stack(found)


def open_cell(peer: Peer, cell: Cell, steps: int, rounds: int) -> None:
    """Have caches for a cell, and of decode its context in them."""
    peer.start(cell.batch, cell.capacity((rounds if peer.goes_on else 1) * (WARM + steps)))
    if cell.phase == "decode":
        peer.fill(cell.context)


def time_round(peer: Peer, cell: Cell, steps: int, vocab: int) -> tuple[list[float], int]:
    """Milliseconds of each step, or prefill; and bytes of memory at their highest so far."""
    if cell.phase == "prefill":
        found = prefill_ms(peer, cell, vocab)
    else:
        peer.rewind(cell.context)
        found = decode_ms(peer.step, cell.batch, cell.context, steps)
    return found, read_peak()


def decode_ms(
    step: Callable[[Sequence[int], int], Sequence[int]], batch: int, context: int, steps: int
) -> list[float]:
    """Milliseconds of each greedy step, from tokens to next tokens, behind so much context."""
    tokens: Sequence[int] = [1] * batch
    found = []
    for length in range(context, context + WARM + steps):
        began = time.perf_counter()
        tokens = step(tokens, length)
        found.append((time.perf_counter() - began) * 1e3)
    return found[WARM:]


def prefill_ms(peer: Peer, cell: Cell, vocab: int) -> list[float]:
    """Milliseconds of each prefill into empty caches."""
    rows = prompts(cell.batch, cell.context, vocab)
    found = []
    for _ in range(PREFILLS):
        peer.rewind(0)
        began = time.perf_counter()
        peer.prefill(rows)
        found.append((time.perf_counter() - began) * 1e3)
    return found[1:]


def free_cell(peer: Peer) -> None:
    """Let the caches go."""
    peer.free()
    gc.collect()
