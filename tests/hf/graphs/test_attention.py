"""Attention by groups of query heads, beside attention written out in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from offload.hf.graphs.attention import _wrap, grouped_attention

HEADS, KV_HEADS, TOKENS, WIDTH, VALUE_WIDTH = 6, 2, 11, 8, 5


class _Module(torch.nn.Module):
    """What transformers' functions look at."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True

    def __init__(self, sinks: torch.Tensor | None) -> None:
        super().__init__()
        self.config: Any = type("Config", (), {"num_attention_heads": HEADS})
        if sinks is not None:
            self.sinks = sinks


def _eager(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **named: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' models have it."""
    keys, values = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
    scores = query @ keys.mT * scaling + (0.0 if mask is None else mask)
    if (sinks := named.get("s_aux")) is not None:
        column = sinks[None, :, None, None].expand(len(scores), -1, scores.shape[2], 1)
        shares = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        shares = torch.softmax(scores, -1)
    if (cap := named.get("softcap")) is not None:
        shares = shares * cap
    return (shares @ values).transpose(1, 2).contiguous(), None


def _states(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    shapes = (HEADS, 1, WIDTH), (KV_HEADS, TOKENS, WIDTH), (KV_HEADS, TOKENS, VALUE_WIDTH)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("mask", ["none", "added", "bool"])
@pytest.mark.parametrize("kind", ["sdpa", "eager", "sinks"])
def test_equals_attention_written_out(kind: str, mask: str) -> None:
    query, key, value = _states(2)
    sinks = torch.linspace(-1, 2, HEADS) if kind == "sinks" else None
    sees = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    sees[1, ..., :4] = False
    sees[..., -2:] = False
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    given = {"none": None, "added": added, "bool": sees}[mask]
    named: dict[str, Any] = {} if sinks is None else {"s_aux": sinks}
    doubles = {name: each.double() for name, each in named.items()}
    module = _Module(sinks)
    expected, _ = _eager(
        module, query.double(), key.double(), value.double(), None if mask == "none" else added.double(), 0.3, **doubles
    )
    sdpa = AttentionInterface._global_mapping["sdpa"]
    function = sdpa if kind == "sdpa" else _eager
    with grouped_attention():
        found, weights = _wrap(function)(module, query, key, value, given, scaling=0.3, **named)
    assert weights is None
    assert found.shape == (2, 1, HEADS, VALUE_WIDTH)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_other_calls_go_the_functions_own_way() -> None:
    """Outside of a step, with a soft cap, several tokens, masks of heads, or a function that is something else."""
    query, key, value = _states(1)
    calls: list[str] = []

    def counted(*given: Any, dropout: float = 0.0, **named: Any) -> tuple[torch.Tensor, None]:
        calls.append("call")
        return _eager(*given, **named)

    def halved(*given: Any, **named: Any) -> tuple[torch.Tensor, None]:
        return 0.5 * counted(*given, **named)[0], None

    module, attend = _Module(None), _wrap(counted)
    plain = attend(module, query, key, value, None, scaling=0.3)[0]
    assert calls == ["call"]
    with grouped_attention():
        torch.testing.assert_close(attend(module, query, key, value, None, scaling=0.3)[0], plain)
        tried = len(calls)
        attend(module, query, key, value, None, scaling=0.3)
        assert len(calls) == tried, "recognised once"
        attend(module, query, key, value, None, scaling=0.3, softcap=2.0)
        attend(module, query.expand(1, HEADS, 3, WIDTH), key, value, None, scaling=0.3)
        attend(module, query, key, value, torch.zeros(1, HEADS, 1, TOKENS), scaling=0.3)
        attend(module, query, key, value, None, dropout=0.1, scaling=0.3)
        assert len(calls) == tried + 4
        found = _wrap(halved)(module, query, key, value, None, scaling=0.3)[0]
        torch.testing.assert_close(found, 0.5 * plain)
