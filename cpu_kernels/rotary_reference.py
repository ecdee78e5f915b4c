"""What `rotary` must compute, with tensor operations of the dtype itself."""

from __future__ import annotations

import torch


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, shared_angles: bool) -> torch.Tensor:
    """X [B, H, T, D] rotated by angles [B or 1, T, P or 2 P]; equal to the kernel's in every bit."""
    if shared_angles:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    width = cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    low, high = turning.chunk(2, -1)
    turned = turning * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return torch.cat([turned, rest], -1)
