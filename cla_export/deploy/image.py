"""What an image that serves has to have installed: python -m cla_export.deploy.image cpu serve

Prints this package's requirements and those of the extras named, but for PyTorch, which only
exports and compares: an image without it is smaller by gigabytes.
"""

import re
import sys
from collections.abc import Iterable
from importlib import metadata

from cla_export.errors import BadInput

_NOT_TO_SERVE = ("torch",)
_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")


def requirements(extras: Iterable[str]) -> list[str]:
    """Requirements in pip's form, of the package as it is installed. BadInput: no such extra."""
    ours = metadata.metadata("cla-export")
    wanted, known = set(extras), set(ours.get_all("Provides-Extra") or ())
    if wanted - known:
        raise BadInput(
            f"extra {min(wanted - known)!r}; expected some of {', '.join(sorted(known))}"
        )
    found = []
    for line in metadata.requires("cla-export") or ():
        requirement, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        name = re.match(r"[\w.-]+", requirement)
        if (extra is None or extra[1] in wanted) and name and name[0] not in _NOT_TO_SERVE:
            found.append(requirement.strip())
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in requirements(sys.argv[1:]))
