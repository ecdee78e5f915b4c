"""When a kernel may stand in for tensor operations."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.nn import Parameter

_TENSORS = (torch.Tensor, Parameter)
_grad_enabled = torch.is_grad_enabled
_tracing = torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled


def is_plain(x: torch.Tensor) -> bool:
    """An ordinary tensor on the CPU, and nothing watches what is done with it: no gradient, trace or cast."""
    return (
        type(x) in _TENSORS
        and x.is_cpu
        and not (x.requires_grad and _grad_enabled())
        and not _compiling()
        and _tracing() is None
        and not _autocast("cpu")
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
