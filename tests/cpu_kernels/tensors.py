"""Random tensors, with poison before and after them in memory."""

from __future__ import annotations

import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

_GUARD = 64


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, with NaN on both sides: a kernel that reads past an end shows it."""
    memory = torch.full((tensor.numel() + 2 * _GUARD,), torch.nan, dtype=tensor.dtype)
    inside = memory[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)
