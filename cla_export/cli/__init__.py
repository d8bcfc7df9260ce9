"""The command line: each command parses, calls one public function, renders. Thin on purpose.

Results go to standard output (as JSON with --json), everything else to standard error. Exit codes:
0 done, 1 a check failed, 2 bad input, 3 a missing package or device, 130 interrupted.
"""

import signal
from importlib import import_module
from typing import NoReturn

from cla_export.cli.app import app
from cla_export.cli.terminal import console_for, escape
from cla_export.errors import ClaExportError

COMMANDS = (  # a module each, in the order that --help lists them
    "inspect",
    "export",
    "rewrite",
    "build",
    "parity",
    "generate",
    "plan",
    "bench",
    "serve",
    "deploy",
    "bench_server",
    "doctor",
    "demo",
)
for _name in COMMANDS:
    import_module(f"cla_export.cli.{_name}")


def main() -> None:
    """Entry point: turns our exceptions into messages and exit codes."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except ClaExportError as error:
        console_for(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        console_for(stderr=True).print("interrupted; nothing was left half-written")
        raise SystemExit(130) from None


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt  # unwinds, so that temporary folders go
