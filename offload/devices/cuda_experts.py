"""Experts of one call on a CUDA device: pairs go there, outputs come back, the host does something else meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gpu_kernels.combine import combine
from gpu_kernels.expert_mlp import default_config, expert_down, expert_mlp, expert_up
from gpu_kernels.grouping import FEW_PAIRS, group_pairs
from offload.devices.base import ExpertBatch, ExpertSums, Work
from offload.devices.cuda_driver import CudaDriver
from offload.moe.gate import apply_gate
from offload.moe.layer import ExpertsLayer


class CudaWork(Work):
    """Kernels that were started on the current stream."""

    def __init__(
        self, driver: CudaDriver, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Start them.

        Args:
            driver: of the device.
            layer: whose experts they are.
            batch: which experts, by address in the device's memory, and their pairs.
            hidden: [T, H], on the device or on the host.
            out: fp32 [R, H] on the host.

        Raises:
            torch.OutOfMemoryError: no room for activations.
        """
        self._driver, self._batch, self._out = driver, batch, out
        device = driver.device
        pairs, experts = len(batch.tokens), len(batch.addresses)
        numbers = np.repeat(np.arange(experts), np.diff(batch.offsets))
        # One copy for all that the host knows.
        known = torch.from_numpy(np.concatenate([batch.addresses, numbers, batch.tokens]).astype(np.int64)).to(device)
        table, ids, tokens = known[:experts], known[experts : experts + pairs, None], known[experts + pairs :]
        x = hidden.to(device)[tokens]
        rows = _rows(layer, x, ids.contiguous(), table)
        ones = torch.ones(pairs, 1, dtype=torch.float32, device=device)
        self._sums = combine(rows, ones, torch.empty(pairs, x.shape[1], dtype=torch.float32, device=device))

    def finish(self) -> None:
        """Wait for the outputs and put them into their rows."""
        self._out.index_copy_(0, torch.from_numpy(self._batch.rows), self._sums.cpu())


_MOST_WARM_PAIRS = 32
_PROMPT_PAIRS = FEW_PAIRS + 1
"""Of prompts, whose kernels differ by no number beyond."""


def warm_up(driver: CudaDriver, layers: Sequence[ExpertsLayer], most_pairs: int) -> None:
    """Run each kind of experts with every number of pairs that decode steps have, and as prompts do, on zeros: kernels
    that differ by it are compiled then, or found in Triton's cache, and not while somebody waits for a token.

    Args:
        driver: of the device.
        layers: of the model.
        most_pairs: of a step; beyond some tens of them kernels no longer differ.
    """
    for layer in {(layer.layout, layer.dtype, layer.activation): layer for layer in layers}.values():
        bundle = driver.allocate(layer.layout.nbytes).zero_()
        hidden = torch.zeros(1, layer.layout.hidden, dtype=layer.dtype)
        for pairs in (*range(1, min(most_pairs, _MOST_WARM_PAIRS) + 1), _PROMPT_PAIRS):
            numbers = np.arange(pairs, dtype=np.int64)
            addresses = np.full(pairs, bundle.data_ptr(), np.intp)
            batch = ExpertBatch(addresses, np.arange(pairs + 1, dtype=np.int64), np.zeros(pairs, np.int64), numbers)
            CudaWork(driver, layer, batch, hidden, torch.empty(pairs, layer.layout.hidden)).finish()
        del bundle
    driver.trim()


def sum_experts(sums: ExpertSums) -> None:
    """See `Accelerator.sum_experts`; the layer's gate is one that kernels know."""
    layer, ids = sums.layer, sums.ids
    assert layer.activation is not None
    rows = expert_mlp(sums.hidden, ids, sums.table, layer.layout, layer.activation)
    # Rows of experts that are not here were not written, and are not read.
    combine(rows, torch.where(sums.table[ids] != 0, sums.weights, 0.0), sums.out)


def _rows(layer: ExpertsLayer, x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """fp32 [S, pairs, H], to be summed over S."""
    layout = layer.layout
    if layer.activation is not None:
        return expert_mlp(x, ids, table, layout, layer.activation)
    config = default_config(x, ids, layout)
    groups = group_pairs(ids, table, config.tokens)
    projected = expert_up(x, groups, table, layout, config)
    h = apply_gate(layer.module, projected.to(layer.dtype), has_gate=layout.has_gate)
    return expert_down(h.contiguous(), groups, table, layout, config)
