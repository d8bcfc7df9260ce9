"""Fixtures for all tests. Heavy packages load only where a test asks for one of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from models_zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> "Zoo":
    """Tiny random models and their exports, shared by all tests of the run."""
    from models_zoo import Zoo

    base = tmp_path_factory.getbasetemp()
    root: Path = (base if worker_id == "master" else base.parent) / "zoo"
    root.mkdir(exist_ok=True)
    return Zoo(root)
