"""Attention to given tokens of each key-value head, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tests.kv.tables import HEADS, WIDTH, Twin

QUERY_HEADS, SCALE = 2 * HEADS, 0.4
Bool = npt.NDArray[np.bool_]


def make_query(twin: Twin, new: int, seed: int = 9) -> torch.Tensor:
    """[B, QUERY_HEADS, new, WIDTH]"""
    return torch.randn(len(twin.keys), QUERY_HEADS, new, WIDTH, generator=torch.Generator().manual_seed(seed))


def padding(twin: Twin, tokens: int) -> Bool:
    """Of the first sequence, so many tokens are padding."""
    valid = np.ones((len(twin.keys), twin.keys.shape[2]), np.bool_)
    valid[0, :tokens] = False
    return valid


def attention(
    twin: Twin, query: torch.Tensor, seen: Bool, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens to those that are seen, and its log-sum-exp without sinks.

    Args:
        twin: the tokens.
        query: [B, Hq, T, D] of the last T.
        seen: bool [B, Hk, tokens]; later tokens are not seen either way.
        sinks: [Hq].
    """
    tokens, new = twin.keys.shape[2], query.shape[2]
    group = query.shape[1] // twin.keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (twin.keys, twin.values))
    scores = SCALE * query.double() @ keys.mT
    causal = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    mask = causal & torch.from_numpy(seen).repeat_interleave(group, 1)[:, :, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is None:
        return torch.softmax(scores, -1) @ values, lse
    column = sinks.double()[None, :, None, None].expand(len(query), -1, new, 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ values, lse
