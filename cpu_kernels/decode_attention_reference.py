"""What `decode_attention` must compute, in float64."""

from __future__ import annotations

import torch


def decode_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Query [B, Hq, 1, D], key [B, Hk, S, D], value [B, Hk, S, V] → [B, 1, Hq, V] in float64, not rounded."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    return (torch.softmax(scale * q @ k.mT, -1) @ v).transpose(1, 2)
