"""Linear layers of few tokens, and routers, which call `F.linear` on a weight of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from cpu_kernels.linear import MOST_TOKENS, linear
from cpu_kernels.wide_linear import linear_many
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.conditions import is_plain, is_weight
from offload.hf.fused.swap import Fused, rebind, swap


def fuse_linears(model: PreTrainedModel) -> int:
    """Every module that is a `torch.nn.Linear` and not of a subclass, or a router; returns how many."""
    count = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or weight.dtype not in FORMAT_OF_DTYPE:
            continue
        forward = _forward if type(module) is torch.nn.Linear else _with_kernel(type(module).forward)
        if forward is not None:
            swap(module, forward)
            count += 1
    return count


@cache
def _with_kernel(forward: Any) -> Callable[..., Any] | None:
    """The forward of a module that calls `F.linear`."""
    scope = getattr(forward, "__globals__", {})
    calls = scope.get("F") is F and "linear" in getattr(forward, "__code__", _forward.__code__).co_names
    return rebind(forward, {"F": _Functional()}) if calls else None


class _Functional:
    """`torch.nn.functional` for one forward, its `linear` computed by a kernel where one takes it."""

    @staticmethod
    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = _computed(input, weight, bias)
        return F.linear(input, weight, bias) if found is None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _forward(self: Fused, input: torch.Tensor) -> torch.Tensor:
    parameters = self._parameters
    found = _computed(input, parameters.get("weight"), parameters["bias"])
    return self.plain.forward(self, input) if found is None else found


def _computed(input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The layer's output, None where torch should compute it."""
    if not is_plain(input) or not is_weight(weight, input) or (bias is not None and not is_weight(bias, input)):
        return None
    # Of sequences that lie apart, as their last tokens do, torch would make a product each, of a copy of the weight.
    rows = input.contiguous()
    if rows.numel() <= MOST_TOKENS * rows.shape[-1]:
        return linear(rows, weight, bias, kernel_pool())
    return linear_many(rows, weight, bias, kernel_pool())
