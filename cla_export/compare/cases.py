"""What the gate runs: one case per way a server may drive the caches.

A case is a polygraphy feed dict, the same for every runner:

    tokens       int64 [B, T]  each row's tokens, padded on the right
    prompts      int64 [B]     how many of them arrive before decoding starts
    steps        int64 []      tokens decoded after that, one at a time, all rows together
    chunk        int64 []      tokens per prefill call; 0: all rows' prompts in one padded call
    first_slot   int64 []      rows take this slot and the ones after it
    reused       int64 []      tokens of the prompt whose keys and values an earlier request left
    held         int64 [B]     made-up tokens that a slot's caches hold before the row's first one;
                               rows that have some take their turns in one slot
    logits_from  int64 [B]     first position whose logits are compared, and asked for
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.compare.report import CaseShape
from cla_export.layout import KVLayout

Feed = dict[str, NDArray[np.int64]]
SLOTS = 4
DECODE_STEPS = 36
_LENGTH = 160  # tokens; longer where a sliding window asks for it
_LONGEST = 640
_SHORT = 3  # tokens of a short piece
_LONG = 1056  # tokens of a long call: past 1024
_LONG_WORK = 2**36  # weights times tokens of such a call, at most
_FAR = 8  # tokens of each row behind made-up ones
_NEAR = 7  # power of two: what other cases reach anyway
_SPREAD = 8  # such rows evenly over the context, beside those at powers of two
_FAR_BYTES = 2**28  # of caches, at most, for reaching them
INPUTS = (
    "tokens",
    "prompts",
    "steps",
    "chunk",
    "first_slot",
    "reused",
    "held",
    "logits_from",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A named feed, with what it would catch."""

    name: str
    about: str
    feed: Feed

    @property
    def held(self) -> list[int]:
        """Of each row."""
        return [int(count) for count in self.feed["held"]]

    @property
    def is_far(self) -> bool:
        """Whether rows begin behind made-up tokens, and take their turns in one slot."""
        return any(self.held)

    @property
    def calls_a_row(self) -> int:
        """Calls that one row of a far case takes: a prompt, then its steps."""
        return 1 + int(self.feed["steps"])

    @property
    def positions(self) -> int:
        """Places that the longest row takes."""
        return int((self.feed["held"] + self.feed["prompts"] + self.feed["steps"]).max())

    @property
    def slots(self) -> int:
        """Slots that it takes, those before its first one included."""
        rows = 1 if self.is_far else len(self.feed["prompts"])
        return int(self.feed["first_slot"]) + rows


@dataclass(frozen=True, slots=True)
class Setup:
    """Cases that run in one executor, one after another, and what it must have."""

    cases: list[Case]
    capacity: int
    slots: int


def case_length(layout: KVLayout, positions: int) -> int:
    """Tokens per row: past every sliding window that is not longer than 600 tokens."""
    windows = [window for window in layout.window if window is not None]
    wanted = max([_LENGTH, *(window + 40 for window in windows)])
    return min(wanted, _LONGEST, positions)


def far_positions(layout: KVLayout, dtype: str, positions: int) -> int:
    """Places of a slot that reaches the last of these, or as far as 256 MiB of caches do."""
    return min(positions, _FAR_BYTES // layout.bytes_per_token(dtype))


def make_setups(
    bundle: Bundle,
    positions: int,
    stream: Sequence[int],
    seed: int,
    weights: int,
    *,
    made_up: bool = True,
) -> tuple[Setup, Setup]:
    """Near: slots as long as rows, filled to the last place by some, with room behind others.

    Far: one slot as long as the context, or as far as its caches may grow. A long call is left out
    where a model of so many weights would take minutes for it. No slot can have more than
    `positions` places. Without `made_up` no case has made-up tokens, and the long call is the
    furthest that any gets.
    """
    length = case_length(bundle.layout, positions)
    near = make_cases(length, stream, seed)
    near.append(token_case(length, bundle.vocab_size, bundle.special_tokens()))
    reach = far_positions(bundle.layout, bundle.cache_dtype, positions)
    far = [far_case(reach, stream)] if made_up else []
    long = long_case(reach, stream)
    if length < long.positions and weights * long.positions <= _LONG_WORK:
        far.append(long)
    furthest = max((case.positions for case in far), default=length)
    return Setup(near, length, SLOTS), Setup(far, reach if made_up else furthest, 1)


def make_cases(length: int, stream: Sequence[int], seed: int) -> list[Case]:
    """Cases of rows up to `length` tokens, cut from a stream of token ids (repeated as needed).

    `seed` draws where prompts end and how long chunks are, within what each case is about.
    """
    draw = np.random.default_rng(seed).uniform
    source = np.resize(np.asarray(stream, np.int64), length * (SLOTS + 4))
    rows = [source[i * length : (i + 1) * length] for i in range(SLOTS + 4)]
    steps = min(DECODE_STEPS, length // 2)
    most = length - steps  # the longest prompt that leaves room for the steps
    ends = (draw(0.05, 0.2), 1.0, draw(0.25, 0.45), draw(0.5, 0.9))
    uneven = [max(1, int(most * end)) for end in ends]
    return [
        Case("prefill", "one prompt in one call", _feed([rows[0]], [length])),
        Case("decode", "a prompt, then single tokens", _feed([rows[1]], [most], steps)),
        Case("decode-from-one", "one-token prompts, then tokens", _feed(rows[2:4], [1, 1], steps)),
        Case(
            "chunked-prefill",
            "one prompt in uneven pieces",
            _feed([rows[3]], [most], min(2, steps), chunk=max(1, int(most * draw(0.1, 0.3)))),
        ),
        Case(
            "ragged-decode",
            "rows of different lengths decoded together",
            _feed(rows[:SLOTS], uneven, steps),
        ),
        Case(
            "batched-prefill",
            "prompts of different lengths in one padded call",
            _feed(rows[1:SLOTS], [uneven[2], most, 1], min(8, steps), chunk=0, first_slot=1),
        ),
        Case(
            "slot-reuse",
            "a shorter prompt in a slot that held a longer one",
            _feed(
                [rows[SLOTS + 1]], [max(1, int(most * draw(0.1, 0.4)))], min(8, steps), first_slot=1
            ),
        ),
        Case(
            "prefix-reuse",
            "a prompt that begins like the one before, from where they part, in short pieces",
            _reusing(rows[SLOTS + 2], max(1, int(most * draw(0.3, 0.8))), min(8, steps)),
        ),
    ]


def far_case(positions: int, stream: Sequence[int]) -> Case:
    """Rows of a few tokens all over a context, around powers of two and up to its last place."""
    length = min(_FAR, max(2, positions // 2))
    steps = length // 2
    ends = {positions - positions * part // _SPREAD for part in range(_SPREAD)}
    ends |= {2**power + steps for power in range(_NEAR, positions.bit_length())}
    held = sorted(end - length for end in ends if length < end <= positions) or [0]
    tokens = np.resize(np.asarray(stream, np.int64), length * len(held))
    rows = [tokens[i * length : (i + 1) * length] for i in range(len(held))]
    feed = _feed(rows, [length - steps] * len(held), steps, held=held)
    return Case("far-positions", "all over the context, behind made-up keys and values", feed)


def long_case(positions: int, stream: Sequence[int]) -> Case:
    """One call as long as servers make them, if the context has room for it."""
    row = np.resize(np.asarray(stream, np.int64), min(positions, _LONG))
    return Case("long-prefill", "one long prompt in one call", _feed([row], [len(row)]))


def token_case(length: int, vocab_size: int, special: Sequence[int]) -> Case:
    """Token ids that no text may have: special ones, ends of integer ranges, others in between.

    A vocabulary that fits into one row is all there.
    """
    edges = [2**power + near for power in range(6, 32) for near in (-1, 0)]
    wanted = dict.fromkeys([*special, 0, 1, vocab_size - 1, vocab_size - 2, *edges])
    known = [token for token in wanted if 0 <= token < vocab_size][:length]
    others = np.linspace(0, vocab_size - 1, min(length, vocab_size)).round().astype(int).tolist()
    row = [*known, *(token for token in others if token not in wanted)][:length]
    steps = min(DECODE_STEPS, len(row) // 2)
    feed = _feed([np.array(row[::-1], np.int64)], [len(row) - steps], steps)
    return Case("rare-tokens", "special tokens, and ids from all over the vocabulary", feed)


def _reusing(row: NDArray[np.int64], prompt: int, steps: int) -> Feed:
    reused = prompt // 2
    feed = _feed([row], [prompt], steps, first_slot=2, reused=reused, chunk=_SHORT)
    feed["logits_from"] = np.array([(reused + prompt) // 2], np.int64)  # of a part of a call
    return feed


def _feed(
    rows: Sequence[NDArray[np.int64]],
    prompts: Sequence[int],
    steps: int = 0,
    *,
    chunk: int | None = None,
    first_slot: int = 0,
    reused: int = 0,
    held: Sequence[int] = (),
) -> Feed:
    tokens = np.zeros((len(rows), max(prompts) + steps), np.int64)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[index, : prompt + steps] = row[: prompt + steps]
    together = chunk == 0
    return {
        "tokens": tokens,
        "prompts": np.array(prompts, np.int64),
        "steps": np.array(steps, np.int64),
        "chunk": np.array(max(prompts) if chunk is None else chunk, np.int64),
        "first_slot": np.array(first_slot, np.int64),
        "reused": np.array(reused, np.int64),
        "held": np.array(held or [0] * len(rows), np.int64),
        "logits_from": np.array([p - 1 if together else 0 for p in prompts], np.int64),
    }


def shape_of(case: Case) -> CaseShape:
    """What a report says of a case."""
    tokens = (case.feed["prompts"] + case.feed["steps"]).tolist()
    return CaseShape(case.name, case.about, case.held, tokens, case.feed["logits_from"].tolist())


def rows_of(feed: Feed) -> list[NDArray[np.int64]]:
    """Each row's tokens, without the padding."""
    totals = feed["prompts"] + feed["steps"]
    return [tokens[:total] for tokens, total in zip(feed["tokens"], totals, strict=True)]


def earlier_request(feed: Feed) -> NDArray[np.int64] | None:
    """What the slot held before a row that reuses a prefix: that, and other tokens after it."""
    reused = int(feed["reused"])
    if not reused:
        return None
    (row,) = rows_of(feed)
    return np.concatenate((row[:reused], row[reused:][::-1]))
