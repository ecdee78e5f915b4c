"""How fast this machine streams its memory."""

from __future__ import annotations

from time import perf_counter

STREAM_NBYTES = 512 << 20
_REPEATS = 5


def stream_bytes_per_s(nbytes: int = STREAM_NBYTES, repeats: int = _REPEATS) -> float:
    """Bytes per second at which torch's threads sum a large fp32 tensor: the best of the repeats.

    The best, because others on the machine can only take away; about a second, so that a run can be preceded by it.
    """
    import torch

    tensor = torch.ones(nbytes // 4)
    tensor.sum()
    best = 0.0
    for _ in range(repeats):
        before = perf_counter()
        tensor.sum()
        best = max(best, tensor.nbytes / (perf_counter() - before))
    return best
