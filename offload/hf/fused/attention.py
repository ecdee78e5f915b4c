"""Attention of one new token and of prompts in the place of transformers' function for "sdpa"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from cpu_kernels.decode_attention import decode_attention
from cpu_kernels.panel_mlp import multiplies_pairs
from cpu_kernels.prompt_attention import prompt_attention
from cpu_kernels.wide_linear import multiplies_natively
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.conditions import is_plain
from offload.hf.fused.swap import swap
from offload.hf.paged.masks import padding_of
from offload.hf.paged.recognition import SDPA, softmax_attention

IMPLEMENTATION = SDPA

# What transformers' function does not ignore among what a model may tell it, and the kernel does not know.
TELLING = ("position_bias", "cache", "softcap", "output_attentions")

_PROMPT_TOKENS = 16
"""From so many new tokens on, laying their keys and values out for a kernel is little of its work."""

_PROMPT_TOKENS_OF_PAIRS = 256
"""Likewise for bf16 where torch multiplies by VDPBF16PS: from here on the kernel is faster (docs/performance.md)."""


def tells_more(named: dict[str, Any]) -> bool:
    """Whether a model tells an attention function what kernels do not know."""
    return any(named.get(name) is not None and named[name] is not False for name in TELLING)


def prompts_are_attended(model: PreTrainedModel) -> bool:
    """Whether a kernel attends to the model's prompts, where its modules dispatch through the interface."""
    dtype, named = model.dtype, model.config.get_text_config()._attn_implementation
    return named == IMPLEMENTATION and dtype in FORMAT_OF_DTYPE and _takes_prompts(dtype, _PROMPT_TOKENS_OF_PAIRS)


def swap_forwards(model: PreTrainedModel, replacement: Callable[[Any], Any]) -> int:
    """Give modules another forward where `replacement` has one for theirs; returns how many."""
    count = 0
    for module in model.modules():
        forward = replacement(type(module).forward)
        if forward is not None:
            swap(module, forward)
            count += 1
    return count


def are_for_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are ordinary tensors of a dtype that attention kernels take, the elements of rows together."""
    return (
        is_plain(query)
        and is_plain(key)
        and is_plain(value)
        and query.dtype is key.dtype is value.dtype
        and query.dtype in FORMAT_OF_DTYPE
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


@softmax_attention
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
    """Transformers' function for "sdpa", or a kernel where one token, or many, attend to all that came before."""
    new, width = query.shape[2:]
    if (
        (new == 1 or new >= _PROMPT_TOKENS)
        and not dropout
        and are_for_kernels(query, key, value)
        and not tells_more(named)
    ):
        scale = width**-0.5 if scaling is None else scaling
        if new == 1:
            if attention_mask is None and key.stride(2) == width:
                return decode_attention(query, key, value, scale, kernel_pool()), None
        elif _takes_prompts(query.dtype, new) and _is_causal(module, query, key, attention_mask, named):
            padding = padding_of(attention_mask, key.shape[2] - new, new)
            if padding is not None:
                valid = None if padding.all_valid else np.ascontiguousarray(padding.valid)
                return prompt_attention(query, key, value, scale, valid=valid, pool=kernel_pool()), None
    sdpa = AttentionInterface._global_mapping[IMPLEMENTATION]
    found: tuple[torch.Tensor, torch.Tensor | None] = sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
    )
    return found


def _is_causal(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, named: dict[str, Any]
) -> bool:
    """Whether a call without a mask is causal from the first token on; a mask says itself what it is."""
    if mask is not None:
        return mask.shape[0] == query.shape[0]
    told = named.get("is_causal")
    causal = getattr(module, "is_causal", True) if told is None else told
    return bool(causal) and query.shape[2] == key.shape[2]


def _takes_prompts(dtype: torch.dtype, new: int) -> bool:
    """Whether the kernel, which widens 16-bit numbers, attends to so many new tokens.

    Torch has instructions for 16-bit numbers on some CPUs, and makes less of them in attention than in products.
    """
    if dtype is torch.float32 or not multiplies_natively(dtype):
        return True
    return dtype is torch.bfloat16 and new >= _PROMPT_TOKENS_OF_PAIRS and multiplies_pairs()
