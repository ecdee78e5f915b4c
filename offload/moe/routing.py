"""Routing of one layer and step, grouped by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import routing_kernel as kernel

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts. A pair is (token, place in its top-k); its row is token * top_k + place.

    Attributes:
        experts: ids of the experts that have tokens, ascending.
        offsets: int64 [n + 1]; the pairs of experts[i] are offsets[i] to offsets[i + 1].
        rows: int64 [pairs]; the row of each pair, by expert, then ascending.
        tokens: int64 [pairs]; the token of each pair.
        weights: fp32 [T, k], contiguous; what each pair's output is multiplied with; 0 for dropped pairs.
        dropped_rows: int64; rows of pairs that are not computed: weight 0, or an expert id out of range.
    """

    experts: list[int]
    offsets: Ints
    rows: Ints
    tokens: Ints
    weights: torch.Tensor
    dropped_rows: Ints

    def select(self, numbers: Sequence[int]) -> tuple[Ints, Ints | slice]:
        """The pairs of some experts, given by their places in `experts`, in that order.

        Returns:
            offsets: int64 [n + 1] into the selection, as `offsets` is into all pairs.
            pairs: what picks them out of `rows` and `tokens`.
        """
        if len(numbers) == len(self.experts) and list(numbers) == list(range(len(numbers))):
            return self.offsets, slice(None)
        starts, ends = self.offsets[:-1][numbers], self.offsets[1:][numbers]
        offsets = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(ends - starts, out=offsets[1:])
        if numbers and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
            return offsets, slice(int(starts[0]), int(ends[-1]))
        return offsets, np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)


def route(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, expert_count: int) -> Routing:
    """Group a router's choice by expert.

    Args:
        top_k_index: integer [T, k]; ids of `expert_count` and above mark pairs that another device would compute.
        top_k_weights: float [T, k].
        expert_count: experts of the layer.
    """
    top_k = top_k_index.shape[-1]
    ids = top_k_index.reshape(-1).numpy(force=True).astype(np.int64, copy=False)
    # A copy: weights of dropped pairs are cleared.
    weights = top_k_weights.detach().reshape(-1, top_k).to("cpu", torch.float32, copy=True).contiguous()
    table = np.empty((kernel.TABLE_ROWS, len(ids) + 1), dtype=np.int64)
    experts, pairs, dropped = kernel.group_pairs(ids, weights.view(-1).numpy(), expert_count, top_k, table)
    return Routing(
        table[kernel.EXPERTS, :experts].tolist(),
        table[kernel.OFFSETS, : experts + 1],
        table[kernel.ROWS, :pairs],
        table[kernel.TOKENS, :pairs],
        weights,
        table[kernel.DROPPED, :dropped],
    )
