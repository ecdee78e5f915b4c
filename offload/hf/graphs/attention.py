"""Attention of a captured step: query heads that share a KV head are rows of one product, so that keys lie still.

Transformers' "eager" functions write keys and values out once for each query head before they multiply, and its "sdpa"
has done so where a mask is given. A step of one token needs neither: [B, Hq, 1, D] is [B, Hk, Hq / Hk, D].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from offload.hf.fused.attention import IMPLEMENTATION, tells_more
from offload.hf.paged.recognition import SINKS, is_softmax_attention
from offload.hf.wrapped_attention import Attention, wrap_attention

_thread = threading.local()


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Within the block, on this thread, models given to `group_attention` attend by groups of query heads."""
    _thread.on = True
    try:
        yield
    finally:
        _thread.on = False


def group_attention(model: PreTrainedModel) -> int:
    """Let every module that dispatches through transformers' interface attend by groups, in such blocks; how many."""
    return wrap_attention(model, _wrap)


def _wrap(function: Attention) -> Attention:
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not _suits(function, module, query, key, attention_mask, dropout, named):
            return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)
        batch, heads, _, width = query.shape
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
        scale = width**-0.5 if scaling is None else scaling
        if function is AttentionInterface._global_mapping[IMPLEMENTATION]:
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
        else:
            out = attend_in_groups(grouped, key, value, attention_mask, scale, named.get(SINKS))
        return out.reshape(batch, 1, heads, value.shape[-1]), None

    return attend


def _suits(
    function: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    named: dict[str, Any],
) -> bool:
    """Whether a call is softmax attention of one token, with one mask for all heads, whose heads share keys."""
    return (
        getattr(_thread, "on", False)
        and query.shape[2] == 1
        and query.shape[1] > key.shape[1]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or mask.shape[1] == 1)
        and not dropout
        and not tells_more(named)
        and is_softmax_attention(function, module, named.get(SINKS) is not None)
    )


def attend_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of one token, by torch's products: [B, Hk, G, V] in the dtype of `value`.

    Args:
        query: [B, Hk, G, D], the query heads of each KV head.
        key: [B, Hk, S, D].
        value: [B, Hk, S, V].
        mask: [B, 1, 1, S], bool or added to scores; None for none.
        scale: of scores.
        sinks: [Hk x G], scores that take their share and give nothing; None for none.
    """
    scores = (torch.matmul(query, key.transpose(2, 3)) * scale).float()
    if mask is not None:
        scores = scores + mask if mask.dtype is not torch.bool else scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        shares = torch.softmax(scores, dim=-1)
    else:
        sink = sinks.float().view(1, *query.shape[1:3], 1)
        highest = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
        shares = torch.exp(scores - highest)
        shares = shares / (shares.sum(dim=-1, keepdim=True) + torch.exp(sink - highest))
    return torch.matmul(shares.to(value.dtype), value)
