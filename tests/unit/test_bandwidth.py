"""How fast memory is read: all of it, with and without a C compiler."""

import numpy as np
import pytest

from cla_export import bandwidth
from cla_export.errors import MissingEnvironment
from cla_export.plugin import compile_cpu


@pytest.mark.parametrize("size", [0, 128, 4096, 100_352])
def test_every_number_is_read(size: int) -> None:
    numbers = np.arange(size, dtype=np.float32) % 7
    assert bandwidth.reader()(numbers) == numbers.sum()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_source: object) -> None:
        raise MissingEnvironment("no C compiler")

    monkeypatch.setattr(compile_cpu, "library", missing)
    bandwidth.reader.cache_clear()
    assert bandwidth.reader()(np.array([1, 3, 2], np.float32)) == 3
    bandwidth.reader.cache_clear()


def test_threads_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 8 << 20)
    assert 1e8 < bandwidth.read_bandwidth(2) < 1e13
