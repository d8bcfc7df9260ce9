"""`faulty_command.py FAULT FILE ARGUMENT...` is `cla-export ARGUMENT...` with a bad executor.

The fault comes once there is a prompt that begins with `TRIGGER`, and FILE exists.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cla_export import cli
from cla_export.engines.executor import Executor, Logits
from cla_export.serve import server

TRIGGER = 1999


def _raise() -> None:
    raise RuntimeError("device lost")


FAULTS: dict[str, Callable[[], object]] = {
    "raises": _raise,  # from then on, at every step
    "stumbles": _raise,  # at steps of such prompts alone
    "exits": sys.exit,  # which ends the thread
    "hangs": lambda: time.sleep(3600),
    "loads slowly": lambda: None,  # until FILE exists; needs no prompt
}


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


class Faulty:
    """An executor that fails from the trigger on."""

    def __init__(self, executor: Executor, fault: str, file: Path) -> None:
        self._executor = executor
        self._fault = fault
        self._file = file
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def prefill(self, slot: int, tokens: Sequence[int], start: int, keep: int = 1) -> Logits:
        self._fail_if(tokens[0] == TRIGGER)
        return self._executor.prefill(slot, tokens, start, keep)

    def prefill_rows(self, first: int, rows: Sequence[Sequence[int]]) -> Logits:
        self._fail_if(any(row[0] == TRIGGER for row in rows))
        return self._executor.prefill_rows(first, rows)

    def decode(self, *rows: Sequence[int]) -> Logits:
        self._fail_if(False)
        return self._executor.decode(*rows)

    def _fail_if(self, triggered: bool) -> None:
        if triggered or self._broken:
            self._broken = self._fault != "stumbles"
            wait_for(self._file)
            FAULTS[self._fault]()


def main() -> None:
    fault, file, sys.argv = sys.argv[1], Path(sys.argv[2]), sys.argv[2:]
    opens = server.open_executor

    def open_faulty(*arguments: Any, **options: Any) -> Executor:
        if fault == "loads slowly":
            wait_for(file)
        executor: Any = Faulty(opens(*arguments, **options), fault, file)
        return executor

    server.open_executor = open_faulty
    cli.main()


if __name__ == "__main__":
    main()
