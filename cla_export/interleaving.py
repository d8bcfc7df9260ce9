"""Weights of experts with their rows interleaved, as ONNX Runtime's MoE reads them on a CPU.

[E, 2 * I, H] with a token's gates first, then its ups, becomes gate, up, gate, up, ... under the
weight's name and INTERLEAVED.
"""

import numpy as np

INTERLEAVED = ".interleaved"


def interleave(weight: np.ndarray) -> np.ndarray:
    """Rows of each expert in that order."""
    experts, rows, columns = weight.shape
    halves = weight.reshape(experts, 2, rows // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def separate(weight: np.ndarray) -> np.ndarray:
    """The inverse: each expert's gates, then its ups."""
    return np.concatenate((weight[:, ::2], weight[:, 1::2]), 1)
