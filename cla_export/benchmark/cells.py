"""The cells that bench measures: each phase, batch and context that was asked for, once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cla_export.benchmark.results import name_of
from cla_export.bundle import Bundle
from cla_export.errors import BadInput

PHASES = ("decode", "prefill")
WARM = 3  # steps before those that are timed: TensorRT captures its graph in the second
_PROMPTS = 5  # that are timed, at most: each is as long as hundreds of steps


@dataclass(frozen=True, slots=True)
class Cell:
    """What is to be measured, and how often."""

    phase: str
    batch: int
    context: int
    times: int

    @property
    def name(self) -> str:
        return name_of(self.phase, self.batch, self.context)

    @property
    def capacity(self) -> int:
        """Tokens that a slot must hold."""
        return self.context + (WARM + self.times if self.phase == "decode" else 0)


def list_cells(
    bundle: Bundle,
    batches: Sequence[int],
    contexts: Sequence[int],
    phases: Sequence[str],
    steps: int,
    prompt: int,
) -> Iterator[Cell]:
    """Every cell, once; BadInput for what cannot be measured."""
    given = {"batch": batches, "context": contexts, "steps": [steps], "prompt": [prompt]}
    for what, numbers in given.items():
        for number in numbers:
            at_least_one(what, number)
    for phase in phases:
        if phase not in PHASES:
            raise BadInput(f"phase is {phase!r}; expected {' or '.join(PHASES)}")
    positions = bundle.max_positions
    if "decode" in phases:
        most = positions - WARM - steps
        for context in contexts:
            if context > most:
                raise BadInput(
                    f"context is {context}; {bundle.folder} has {positions} positions, and the "
                    f"steps take {WARM + steps} of them: expected at most {most}"
                )
        for batch in dict.fromkeys(batches):
            for context in dict.fromkeys(contexts):
                yield Cell("decode", batch, context, steps)
    if "prefill" in phases:
        yield Cell("prefill", 1, min(prompt, positions), min(steps, _PROMPTS))


def at_least_one(what: str, number: int) -> None:
    """BadInput for anything but a whole number of at least 1."""
    if type(number) is not int or number < 1:
        raise BadInput(f"{what} is {number!r}; expected a whole number, at least 1")
