"""What was launched for a node is launched again by its note: in C, with made-up functions."""

import ctypes

import numpy as np
import pytest

from cla_export.engines.cuda_notes import Call, Copied, Multiplied, to_launches
from cla_export.errors import RunError
from cla_export.plugin import compile_cpu
from cla_export.plugin.launch import Launched, Settings

Void, Int = ctypes.c_void_p, ctypes.c_int
X, W, Y, ROOM = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 0x7F00000FF000
STREAM, KERNEL, HANDLE = 0x51, 0x99, 0x77


class Library:
    """`host_ops.c`, whose driver writes down what it is asked."""

    def __init__(self) -> None:
        self.did: list[tuple[object, ...]] = []
        self.asked: list[int] = []
        self.status = 0
        self._lib = ctypes.CDLL(str(compile_cpu.library(compile_cpu.HOST_OPERATORS)))
        launch = ctypes.CFUNCTYPE(Int, Void, Void, ctypes.POINTER(Void), Void)(self._launch)
        copy = ctypes.CFUNCTYPE(Int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, Void)(
            lambda *given: self._write("copy", *given)
        )
        multiply = ctypes.CFUNCTYPE(
            Int, Void, *[Int] * 5, ctypes.POINTER(ctypes.c_float), Void, Int, Int, Void, Int, Int,
            ctypes.POINTER(ctypes.c_float), Void, *[Int] * 4,
        )(self._multiply)  # fmt: skip
        callback = ctypes.CFUNCTYPE(Int, ctypes.POINTER(Call))(self._ask)
        self._alive = launch, copy, multiply, callback
        self._lib.cla_set_driver(*(ctypes.cast(f, Void) for f in self._alive[:3]))
        self._lib.cla_set_callback(callback)
        self._notes = Void()
        self.next: list[Launched | Copied | Multiplied] = []

    def run(self, **tensors: object) -> int:
        """A call of one node; returns its status."""
        self._call = call_of(**tensors)
        self._call.notes = ctypes.addressof(self._notes)
        return int(self._lib.cla_run(ctypes.byref(self._call)))

    def _ask(self, call: object) -> int:
        self.asked.append(call.contents.inputs[0].data)
        launches = self.next
        made = to_launches(call.contents, launches)
        return int(self._lib.cla_note(call, made, ctypes.c_int64(len(launches))))

    def _write(self, *what: object) -> int:
        self.did.append(what)
        return self.status

    def _launch(self, config: int, kernel: int, arguments: object, _extra: object) -> int:
        """CUlaunchConfig: seven numbers, a stream, attributes of 72 bytes, their count."""
        numbers = (ctypes.c_uint32 * 7).from_address(config)
        stream, attributes = (Void * 2).from_address(config + 32)
        count = ctypes.c_uint32.from_address(config + 48).value
        flags = {}
        for index in range(count):
            at = attributes + 72 * index
            kind = ctypes.c_int32.from_address(at).value
            flags[kind] = tuple((ctypes.c_uint32 * (3 if kind == 4 else 1)).from_address(at + 8))
        pointer = ctypes.c_uint64.from_address(arguments[0]).value
        number = ctypes.c_int32.from_address(arguments[1]).value
        real = ctypes.c_float.from_address(arguments[2]).value
        last = ctypes.c_uint64.from_address(arguments[3]).value
        return self._write(
            "kernel", kernel, tuple(numbers), stream, flags, pointer, number, real, last
        )

    def _multiply(self, *given: object) -> int:
        plain = [value.contents.value if hasattr(value, "contents") else value for value in given]
        return self._write("multiply", *plain)


def call_of(x: int = X, w: int = W, y: int = Y, tokens: int = 5) -> Call:
    call = Call(node=3, kind=0, stream=STREAM)
    for place, (data, shape) in enumerate([(x, (1, tokens, 8)), (w, (16, 8))]):
        call.inputs[place].data, call.inputs[place].rank = data, len(shape)
        call.inputs[place].dims[: len(shape)] = shape
    call.outputs[0].data, call.outputs[0].rank = y, 3
    return call


def settings(**other: int) -> Settings:
    given = {"cluster": 1, "overlap": False, **other}
    return Settings((2, 3, 1), 256, given["cluster"], 1024, bool(given["overlap"]), None)


@pytest.fixture
def library() -> Library:
    return Library()


def test_a_kernel_is_launched_with_the_tensors_of_the_call(library: Library) -> None:
    arguments = X, np.int32(-7), np.float32(0.25), ROOM
    library.next = [Launched(KERNEL, settings(cluster=4, overlap=1), arguments)]
    assert library.run() == 0
    assert library.asked == [X] and not library.did  # whoever was asked has launched it
    assert library.run(x=0x1234) == 0
    numbers = (8, 3, 1, 256, 1, 1, 1024)
    flags = {4: (4, 1, 1), 6: (1,)}
    assert library.did == [("kernel", KERNEL, numbers, STREAM, flags, 0x1234, -7, 0.25, ROOM)]
    assert library.asked == [X]


def test_a_plain_kernel_has_no_attributes(library: Library) -> None:
    library.next = [Launched(KERNEL, settings(), (Y, np.int32(1), np.float32(1), 0))]
    library.run()
    library.run(y=0x88)
    assert library.did == [
        ("kernel", KERNEL, (2, 3, 1, 256, 1, 1, 1024), STREAM, {}, 0x88, 1, 1.0, 0)
    ]


def test_copies_and_products(library: Library) -> None:
    library.next = [
        Copied(Y, X, 160),
        Multiplied(HANDLE, X, W, Y, 5, 16, 8, 2, add=True),
        Multiplied(HANDLE, ROOM, W, Y, 5, 16, 8, 2, add=False),
    ]
    library.run()
    library.run(x=0x10, w=0x20, y=0x30)
    kinds = (1, 0, 16, 5, 8)
    assert library.did == [
        ("copy", 0x30, 0x10, 160, STREAM),
        ("multiply", HANDLE, *kinds, 1.0, 0x20, 2, 8, 0x10, 2, 8, 1.0, 0x30, 2, 16, 68, -1),
        ("multiply", HANDLE, *kinds, 1.0, 0x20, 2, 8, ROOM, 2, 8, 0.0, 0x30, 2, 16, 68, -1),
    ]


def test_other_shapes_and_other_aliases_are_asked_for(library: Library) -> None:
    library.next = [Copied(Y, X, 1)]
    for tensors in ({}, {"tokens": 6}, {"y": X}, {"w": 0}):
        library.run(**tensors)
    assert len(library.asked) == 4 and not library.did
    for tensors in ({}, {"tokens": 6}, {"y": X}, {"w": 0}, {"x": 0x40, "y": 0x40}):
        library.run(**tensors)
    assert len(library.asked) == 4
    # where y was x, Y was no tensor's address but some other memory's
    assert [did[1:3] for did in library.did] == [(Y, X)] * 4 + [(Y, 0x40)]


def test_the_oldest_note_is_given_up(library: Library) -> None:
    library.next = []
    for tokens in range(1, 130):
        library.run(tokens=tokens)
    library.run(tokens=129)
    library.run(tokens=2)
    assert len(library.asked) == 129
    library.run(tokens=1)
    assert len(library.asked) == 130


def test_a_launch_that_fails_is_told(library: Library) -> None:
    library.next = [Copied(Y, X, 1), Copied(Y, X, 1)]
    library.run()
    library.status = 700
    assert library.run() == 700
    assert len(library.did) == 1


def test_more_arguments_than_there_is_room_for() -> None:
    with pytest.raises(RunError, match="25 arguments"):
        to_launches(call_of(), [Launched(KERNEL, settings(), (np.int32(1),) * 25)])
