"""Attention of many queries with its log-sum-exp, by plain products: for devices other than the CPU."""

from __future__ import annotations

import torch

from placement.kv_settings import SCORES_NBYTES


def attend_in_pieces(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scores_nbytes: int = SCORES_NBYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, some queries at a time.

    Args:
        query: fp32 [1, H, T, D].
        keys: fp32 [1, H, S, D].
        values: fp32 [1, H, S, V].
        scale: of the scores.
        mask: fp32 [T, S], added to scores; None for none.
        causal: query i sees keys up to i.
        scores_nbytes: see SCORES_NBYTES.

    Returns:
        fp32 [1, H, T, V], and the logarithm of the sum of exponentials, fp32 [1, H, T]. Of a query that sees nothing:
        zeros and minus infinity.
    """
    _, heads, tokens, _ = query.shape
    count = keys.shape[2]
    out = query.new_empty(1, heads, tokens, values.shape[3])
    lse = query.new_empty(1, heads, tokens)
    most = max(1, scores_nbytes // (4 * heads * count))
    at = torch.arange(count, device=query.device)
    for first in range(0, tokens, most):
        end = min(tokens, first + most)
        # Of causal attention nothing behind the last query is looked at.
        seen = min(count, end) if causal else count
        scores = (query[:, :, first:end] @ keys[:, :, :seen].mT) * scale
        if mask is not None:
            scores += mask[first:end, :seen]
        if causal:
            later = at[:seen] > torch.arange(first, end, device=query.device)[:, None]
            scores.masked_fill_(later, -torch.inf)
        lse[:, :, first:end] = torch.logsumexp(scores, -1)
        shares = torch.softmax(scores, -1)
        if mask is not None:
            shares.nan_to_num_(0.0)
        out[:, :, first:end] = shares @ values[:, :, :seen]
    return out, lse
