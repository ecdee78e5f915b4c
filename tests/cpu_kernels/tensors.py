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


def attention_inputs(
    batch: int, heads: int, kv_heads: int, new: int, tokens: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as a model has them: a transposed query, and a cache that has room for more, poisoned."""
    query = poisoned(random((batch, new, heads, width), dtype, 1)).transpose(1, 2)
    parts = []
    for seed, columns in ((2, width), (3, value_width)):
        room = torch.full((batch, kv_heads, tokens + 9, columns), torch.nan, dtype=dtype)
        room[:, :, :tokens] = random((batch, kv_heads, tokens, columns), dtype, seed)
        parts.append(room[:, :, :tokens])
    return query, parts[0], parts[1]
