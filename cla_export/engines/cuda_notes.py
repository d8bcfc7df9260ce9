"""What was launched for a node, as `plugin/host_launches.h` keeps it to launch it again."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from cla_export.errors import MissingEnvironment, RunError
from cla_export.plugin.launch import Launched

MAX_INPUTS, MAX_OUTPUTS, MAX_RANK = 6, 3, 4
_MAX_WORDS = 24
_KERNEL, _COPY, _PRODUCT = range(3)


class Argument(ctypes.Structure):
    """A tensor of a node; `data` is None where it is missing."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_int64 * MAX_RANK),
    ]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims[: self.rank])


class Call(ctypes.Structure):
    """A node that is to be computed."""

    _fields_: ClassVar = [
        ("node", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("notes", ctypes.c_void_p),
        ("inputs", Argument * MAX_INPUTS),
        ("outputs", Argument * MAX_OUTPUTS),
    ]


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that were copied on the device."""

    target: int
    source: int
    size: int


@dataclass(frozen=True, slots=True)
class Multiplied:
    """A product by cuBLAS: y [tokens, n], or what is added to it, from x [tokens, k], w [n, k]."""

    handle: int
    x: int
    w: int
    y: int
    tokens: int
    n: int
    k: int
    kind: int  # cuBLAS's number of the type
    add: bool


class _Word(ctypes.Structure):
    _fields_: ClassVar = [("tensor", ctypes.c_int64), ("value", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_: ClassVar = [
        ("what", ctypes.c_int64),
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("overlap", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("words", _Word * _MAX_WORDS),
    ]


class Notes:
    """Keeps launches with the nodes of a library.

    Args:
        library: `plugin/host_ops.c`, compiled.
        cublas: NVIDIA's library of products.
    """

    def __init__(self, library: Path, cublas: ctypes.CDLL) -> None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise MissingEnvironment(f"NVIDIA's driver does not load: {error}") from error
        self._library = ctypes.CDLL(str(library))
        functions = driver.cuLaunchKernelEx, driver.cuMemcpyDtoDAsync_v2, cublas.cublasGemmEx
        self._library.cla_set_driver(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))

    def add(self, call: Call, launches: Sequence[Launched | Copied | Multiplied]) -> None:
        """Note what was launched for a call. RunError if there is no memory for it."""
        made = to_launches(call, launches)
        if self._library.cla_note(ctypes.byref(call), made, ctypes.c_int64(len(launches))):
            raise RunError("no memory for what a node launches")


def to_launches(
    call: Call, launches: Sequence[Launched | Copied | Multiplied]
) -> "ctypes.Array[_Launch]":
    """Launches with the call's tensors by number, in place of their addresses."""
    tensors = {
        argument.data: number
        for number, argument in reversed(list(enumerate([*call.inputs, *call.outputs])))
        if argument.data
    }
    made = (_Launch * len(launches))()
    for into, launch in zip(made, launches, strict=True):
        if isinstance(launch, Launched):
            settings, (x, y, z) = launch.settings, launch.settings.grid
            into.what, into.function = _KERNEL, launch.kernel
            into.grid[:] = x * settings.cluster, y, z
            into.threads, into.shared_bytes = settings.threads, settings.shared_bytes
            into.cluster, into.overlap = settings.cluster, settings.overlap
            values: Sequence[int | np.generic] = launch.arguments
        elif isinstance(launch, Copied):
            into.what = _COPY
            values = launch.target, launch.source, np.int64(launch.size)
        else:
            into.what, into.function = _PRODUCT, launch.handle
            sizes = launch.tokens, launch.n, launch.k, launch.kind, launch.add
            values = launch.x, launch.w, launch.y, *map(np.int64, sizes)
        _fill(into, values, tensors)
    return made


def _fill(launch: _Launch, values: Sequence[int | np.generic], tensors: Mapping[int, int]) -> None:
    """Put in words: plain integers are addresses, other numbers their bits."""
    if len(values) > _MAX_WORDS:
        raise RunError(f"a kernel of {len(values)} arguments; expected at most {_MAX_WORDS}")
    launch.count = len(values)
    for word, value in zip(launch.words, values, strict=False):
        if isinstance(value, np.generic):
            word.tensor, word.value = -1, int.from_bytes(value.tobytes(), "little")
        else:
            word.tensor, word.value = tensors.get(value, -1), value or 0
