"""Whether an attention function computes what the paged kernels compute, found out by trying it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

SDPA = "sdpa"
SINKS = "s_aux"
"""How transformers names sinks where it hands them to an attention function."""

_TOKENS, _NEW, _WIDTH = 7, 2, 8
_declared: set[Callable[..., Any]] = set()
_known: dict[tuple[Any, type, bool], bool] = {}


def softmax_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that a function is softmax attention, without sinks."""
    _declared.add(function)
    return function


def is_softmax_attention(function: Callable[..., Any], module: torch.nn.Module, has_sinks: bool) -> bool:
    """Whether a function is softmax(scale q K^T + mask) V, with sinks in the denominator where it is given some.

    Transformers' own for "sdpa" is known, without sinks; others are run once on random values.

    Args:
        function: takes what transformers' attention functions take.
        module: whose attention it is.
        has_sinks: it is given some.
    """
    if function in _declared or function is AttentionInterface._global_mapping[SDPA]:
        return not has_sinks
    key = (function, type(module), has_sinks)
    if key not in _known:
        _known[key] = _tried(function, module, has_sinks)
    return _known[key]


def _tried(function: Callable[..., Any], module: torch.nn.Module, has_sinks: bool) -> bool:
    sinks = getattr(module, "sinks", None)
    config: Any = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    if kv_heads < 1 or (has_sinks and (sinks is None or sinks.shape != (heads,))):
        return False
    dtype, device = (torch.float32, None) if sinks is None else (sinks.dtype, sinks.device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, count, tokens, _WIDTH, generator=generator).to(device, dtype)
        for count, tokens in ((heads, _NEW), (kv_heads, _TOKENS), (kv_heads, _TOKENS))
    )
    later = torch.ones(_NEW, _TOKENS, dtype=torch.bool, device=device).triu(_TOKENS - _NEW + 1)
    mask = torch.zeros(_NEW, _TOKENS, dtype=dtype, device=device).masked_fill_(later, torch.finfo(dtype).min)
    given: dict[str, Any] = {"s_aux": sinks} if has_sinks else {}
    try:
        with torch.no_grad():
            found, _ = function(module, q, k, v, mask[None, None], dropout=0.0, scaling=0.5, **given)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    expected = _reference(q.double(), k.double(), v.double(), mask.double(), sinks if has_sinks else None)
    bound = 1e-5 if dtype is torch.float32 else 3e-2
    return found.shape == expected.shape and bool((found.double() - expected).abs().max() < bound)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    scores = 0.5 * q @ k.repeat_interleave(group, 1).mT + mask
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(1, -1, _NEW, 1)
        shares = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        shares = torch.softmax(scores, -1)
    return (shares @ v.repeat_interleave(group, 1)).transpose(1, 2)
