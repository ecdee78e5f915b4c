"""One new token's attention where a model's config names another function than "sdpa", by the kernel of "sdpa".

Such functions ("eager", the only one that families with sinks have) write keys and values out for every query head.
Where trying one shows that it is softmax attention, with sinks or without, the kernel computes it in place, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from cpu_kernels.decode_attention import decode_attention
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.attention import are_for_kernels, tells_more
from offload.hf.paged.recognition import SINKS, is_softmax_attention

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def with_kernel(function: Attention) -> Attention:
    """The function, but for what the kernel computes as it does."""

    @wraps(function)
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
        if dropout or not _suits(function, module, query, key, value, attention_mask, named):
            return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)
        sinks = named.get(SINKS)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        wide = None if sinks is None else sinks.detach().float().contiguous()
        return decode_attention(query, key, value, scale, kernel_pool(), wide), None

    return attend


def _suits(
    function: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    named: dict[str, Any],
) -> bool:
    """Whether a call is softmax attention of one token to all that is there, of tensors that the kernel takes."""
    return (
        query.shape[2] == 1
        and are_for_kernels(query, key, value)
        and key.stride(2) == query.shape[3]
        and _hides_nothing(mask)
        and not tells_more(named)
        and not getattr(getattr(module, "config", None), "output_attentions", False)
        and is_softmax_attention(function, module, named.get(SINKS) is not None)
    )


def _hides_nothing(mask: torch.Tensor | None) -> bool:
    if mask is None:
        return True
    return bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any())
