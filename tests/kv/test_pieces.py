"""Attention in pieces beside attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from offload.kv.pieces import attend_in_pieces


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries_at_once", [1, 3, 50])
def test_equals_attention_written_out(queries_at_once: int, causal: bool, masked: bool) -> None:
    heads, tokens, width, value_width = 3, 13, 8, 5
    count = tokens if causal else 21
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, heads, rows, columns, generator=generator)
        for rows, columns in ((tokens, width), (count, width), (count, value_width))
    )
    seen = torch.ones(tokens, count, dtype=torch.bool)
    if masked:
        seen[:, :2] = False
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf) if masked else None
    if causal:
        seen = seen & torch.ones(tokens, count, dtype=torch.bool).tril()
    scores = (0.4 * query.double() @ keys.double().mT).masked_fill(~seen, -torch.inf)
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ values.double()
    out, lse = attend_in_pieces(
        query, keys, values, 0.4, mask, causal=causal, scores_nbytes=queries_at_once * 4 * heads * count
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-6)
