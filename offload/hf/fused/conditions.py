"""When a kernel may stand in for tensor operations."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.nn import Parameter

_TAKEN = frozenset({"input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict"})
"""What a decoder may be passed by whoever wants its hidden state and its cache."""

_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")

_TENSORS = (torch.Tensor, Parameter)
_grad_enabled = torch.is_grad_enabled
_tracing = torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled


def is_plain(x: torch.Tensor) -> bool:
    """`is_ordinary`, on the CPU."""
    return type(x) in _TENSORS and x.is_cpu and is_ordinary(x)


def is_ordinary(x: torch.Tensor) -> bool:
    """An ordinary tensor, and nothing watches what is done with it: no gradient, trace or cast."""
    return (
        type(x) in _TENSORS
        and not (x.requires_grad and _grad_enabled())
        and not _compiling()
        and _tracing() is None
        and not _autocast(x.device.type)
    )


def is_weight(weight: torch.Tensor | None, x: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """An ordinary parameter of the dtype and on the device of `x`, which needs no gradient."""
    return (
        weight is not None
        and type(weight) in _TENSORS
        and weight.dtype is x.dtype
        and weight.is_cpu
        and weight.is_contiguous()
        and not (weight.requires_grad and _grad_enabled())
    )


def returns_hidden_and_cache(config: Any, passed: dict[str, Any]) -> bool:
    """Whether nothing is asked of a decoder but the hidden state and the cache.

    Args:
        config: the decoder's.
        passed: what it is called with, by name.
    """
    use_cache = passed.get("use_cache")
    return (
        bool(config.use_cache if use_cache is None else use_cache)
        and passed.get("return_dict", config.return_dict) is True
        and not any(passed[name] if name in passed else getattr(config, name, False) for name in _OUTPUTS)
        and all(value is None or value is False or name in _TAKEN for name, value in passed.items())
    )
