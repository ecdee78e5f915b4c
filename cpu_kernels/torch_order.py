"""Whether `torch_order_kernel` knows the order in which this torch leaves equal numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.jit import entry
from cpu_kernels.torch_order_kernel import order_as_torch

_ROWS = 64


@cache
def _orderer() -> Any:
    """Compiled order(shares fp32 [rows, n], ids int64 [rows, k], queue int64 [n]) → whether all have an answer."""

    def order(shares: Any, ids: Any, queue: Any) -> bool:
        known = True
        for row in range(len(shares)):
            known = order_as_torch(shares[row], ids[row], queue) and known
        return known

    return entry("boolean(float32[:, ::1], int64[:, ::1], int64[::1])")(order)


def top_k_as_torch(shares: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int64] | None:
    """The indices [rows, top_k] that `torch.topk` finds in fp32 [rows, n]; None where torch would go another way."""
    ids = np.empty((len(shares), top_k), np.int64)
    known = _orderer()(np.ascontiguousarray(shares), ids, np.empty(shares.shape[1], np.int64))
    return ids if known else None


@cache
def orders_as_torch(count: int, top_k: int) -> bool:
    """Whether the kernel leaves equals as this torch does: rows of `count` numbers, few to many of them equal."""
    generator = np.random.default_rng(count)
    kinds = np.linspace(1, 2 * count, _ROWS).astype(np.int64)[:, None]
    shares = (generator.integers(0, 1 << 20, (_ROWS, count)) % kinds).astype(np.float32)
    found = top_k_as_torch(shares, top_k)
    return found is not None and np.array_equal(found, torch.topk(torch.from_numpy(shares), top_k).indices.numpy())
