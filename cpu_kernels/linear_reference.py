"""What `linear` must compute, in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """X [T, K] W^T [K, N] + b [N] in float64, not rounded."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())
