"""What `attention_partial` and `merge_attention` must give together, in float64."""

from __future__ import annotations

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    *,
    scale: float,
    first_query: int,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [B, Hq, Q, Dv] and the log-sum-exp [B, Hq, Q]; 0 and -inf where a query sees no key."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (tensor.double().repeat_interleave(repeat, 1) for tensor in (k, v))
    scores = scale * q.double() @ keys.mT
    position = first_query + torch.arange(q.shape[2])[:, None]
    key = torch.arange(k.shape[2])[None]
    seen = key < torch.tensor(lengths)[:, None, None, None]
    if causal:
        seen = seen & (key <= position)
    if window:
        seen = seen & (key > position - window)
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ values, scores.logsumexp(-1)
