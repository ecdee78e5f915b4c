"""What `decode_attention` must compute, in float64."""

from __future__ import annotations

import torch


def decode_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Query [B, Hq, 1, D], key [B, Hk, S, D], value [B, Hk, S, V], sinks [Hq] → [B, 1, Hq, V] in float64, not
    rounded.
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = scale * q @ k.mT
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(len(q), -1, 1, 1)], -1)
    return (torch.softmax(scores, -1)[..., : k.shape[2]] @ v).transpose(1, 2)
