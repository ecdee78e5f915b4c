"""What `rms_norm` must compute, in float64 but for the roundings of its forms."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float, form: str) -> torch.Tensor:
    """float64, as x; not rounded at the end."""
    wide, w = x.double(), weight.double()
    scaled = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
    if form == "rounded":
        scaled = scaled.to(x.dtype).double()
    return scaled * (1 + w if form == "plus_one" else w)
