"""How much of attention went to each part of the keys, from the log-sum-exp of parts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.shares_kernel import add_shares_of_parts
from cpu_kernels.tensors import describe


def add_shares(lse: torch.Tensor, weight: float, into: npt.NDArray[np.float64]) -> None:
    """Add each part's share of attention, summed over queries and heads and times a weight; sums are float64.

    Args:
        lse: fp32 [B, parts, H, T] on the CPU, each part contiguous; minus infinity of a part without keys.
        weight: of each query.
        into: float64 [B, parts].

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    if (
        lse.ndim != 4
        or lse.dtype is not torch.float32
        or not lse.is_cpu
        or not (0 in lse.shape or lse[0, 0].is_contiguous())
        or into.shape != lse.shape[:2]
        or into.dtype != np.float64
    ):
        raise ValueError(
            "add_shares: expected fp32 lse [B, parts, H, T] on the CPU of contiguous parts and float64 sums "
            f"[B, parts], found {describe(lse)} and {into.dtype} {into.shape}"
        )
    add_shares_of_parts(lse.flatten(2).numpy(), weight, into)
