"""What tests on a GPU share."""

import pytest

from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import MissingEnvironment


@pytest.fixture
def memory() -> CudaMemory:
    """Memory of the first GPU; skips where there is none."""
    try:
        return CudaMemory()
    except MissingEnvironment as error:
        pytest.skip(str(error))
