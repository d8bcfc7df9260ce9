"""Where pip puts TensorRT-RTX, and the one link that its wheel lacks.

Its ONNX parser opens `libtensorrt_rtx.so`; the wheel has the library under a versioned name alone.
On the first plugin node the parser then aborts the process (seen with 1.7).
"""

from importlib import util
from pathlib import Path

_PACKAGE, _NAME = "tensorrt_rtx_libs", "libtensorrt_rtx.so"


def rtx_library() -> Path | None:
    """The versioned library, such as libtensorrt_rtx.so.1; None without the wheel."""
    spec = util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        found = sorted(Path(place).glob(f"{_NAME}.*"))
        if found:
            return found[0]
    return None


def rtx_link(library: Path) -> Path:
    """Where the parser looks for that library, once its folder is searched."""
    return library.parent / _NAME
