"""What `combine` must compute, in float64."""

from __future__ import annotations

import torch


def combine_reference(rows: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """float64 [T, H]; arguments as of `combine`."""
    tokens, top_k = weights.shape
    total = torch.zeros(tokens, rows.shape[-1], dtype=torch.float64) if base is None else base.double().clone()
    for token in range(tokens):
        for i in range(top_k):
            if weights[token, i] != 0:
                total[token] += weights[token, i].double() * rows[:, token * top_k + i].double().sum(0)
    return total
