"""How much of a host's memory a server of a bundle takes, where nothing may be swapped out."""

from cla_export.bundle import WEIGHTS, Bundle
from cla_export.serve.pool import PoolSize

_SERVER = 256 * 2**20  # Python, ONNX Runtime and the tokenizer; 180 MiB measured
_SPARE = 0.05  # of the weights and the pool: activations, and what allocators keep
_CHOOSING = 32  # bytes for each logit of each row, while tokens are chosen


def memory_to_serve(bundle: Bundle, pool: PoolSize) -> int:
    """Bytes: weights, all of the KV pool, and the server.

    Weights are mapped from their files. A cluster counts those pages too, and a pod that has no
    room for them would read them again for every token.
    """
    files = [bundle.folder / name for name in (WEIGHTS, *bundle.linked)]
    weights = sum(path.stat().st_size for path in files if path.is_file())
    choosing = pool.slots * bundle.vocab_size * _CHOOSING
    return round((weights + pool.total) * (1 + _SPARE)) + choosing + _SERVER
