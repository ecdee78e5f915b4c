"""Attention of one new token, as transformers lets a model overwrite an attention function locally.

A module that dispatches through `AttentionInterface` gets an interface of its own whose "sdpa" knows decoding. Which
implementation the config names still decides: "eager" and others go their own way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from cpu_kernels.decode_attention import decode_attention
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.conditions import is_plain
from offload.hf.fused.swap import rebind, swap

_NAME = "ALL_ATTENTION_FUNCTIONS"
IMPLEMENTATION = "sdpa"

# What transformers' function does not ignore among what a model may tell it, and the kernel does not know.
TELLING = ("position_bias", "cache", "softcap", "output_attentions")


def fuse_attention(model: PreTrainedModel) -> int:
    """Modules whose forward dispatches through the interface; returns how many."""
    return swap_forwards(model, _with_kernel)


def swap_forwards(model: PreTrainedModel, replacement: Callable[[Any], Any]) -> int:
    """Give modules another forward where `replacement` has one for theirs; returns how many."""
    count = 0
    for module in model.modules():
        forward = replacement(type(module).forward)
        if forward is not None:
            swap(module, forward)
            count += 1
    return count


@cache
def _with_kernel(forward: Any) -> Any:
    scope = getattr(forward, "__globals__", {})
    if not isinstance(scope.get(_NAME), AttentionInterface):
        return None
    return rebind(forward, {_NAME: _interface()})


@cache
def _interface() -> AttentionInterface:
    interface = AttentionInterface()
    interface[IMPLEMENTATION] = attend
    return interface


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
    """Transformers' function for "sdpa", or the kernel where one token attends to all that are there."""
    width = query.shape[3]
    if (
        query.shape[2] == 1
        and attention_mask is None
        and not dropout
        and is_plain(query)
        and is_plain(key)
        and is_plain(value)
        and query.dtype is key.dtype is value.dtype
        and query.dtype in FORMAT_OF_DTYPE
        and query.stride(3) == 1
        and key.stride()[2:] == (width, 1)
        and value.stride(3) == 1
        and not any(named.get(name) is not None and named[name] is not False for name in TELLING)
    ):
        scale = width**-0.5 if scaling is None else scaling
        return decode_attention(query, key, value, scale, kernel_pool()), None
    sdpa = AttentionInterface._global_mapping[IMPLEMENTATION]
    found: tuple[torch.Tensor, torch.Tensor | None] = sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
    )
    return found
