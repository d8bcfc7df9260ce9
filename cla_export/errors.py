"""Everything cla-export raises on purpose, and the exit code the command line gives it.

A message says what failed, what was got, what was expected, where, and what to do about it.
"""


class ClaExportError(Exception):
    """Base of every error a user can cause. `exit_code` is what the command line exits with."""

    exit_code = 2


class BadInput(ClaExportError):
    """The input is wrong: a folder, a config, a weight, an owner map, a prompt (exit code 2)."""


class LayoutError(BadInput):
    """A KV layout that is illegal, or that cannot be read from a config."""


class GraphError(BadInput):
    """A graph the rewriter cannot understand; the message names the node and what was seen."""


class BundleError(BadInput):
    """A bundle that is incomplete, was changed after export, or does not fit the request."""


class RunError(BundleError):
    """A runtime cannot open a bundle's graph, or fails while running it."""


class CheckFailed(ClaExportError):
    """A check ran to its end and its answer is no, such as a parity breach (exit code 1)."""

    exit_code = 1


class MissingEnvironment(ClaExportError):
    """A package, a driver or a device that the request needs is not there (exit code 3)."""

    exit_code = 3
