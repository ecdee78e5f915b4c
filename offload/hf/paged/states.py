"""What a paged layer hands to attention instead of all keys and values: their shape, and the way to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PLAIN = torch._C.DisableTorchFunctionSubclass

_TOLD = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "is_cpu", "is_cuda", "ndim", "requires_grad", "layout", "is_meta")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}
"""What a tensor is asked without its values."""


class CachedStates(torch.Tensor):
    """Keys or values [B, H, S, D] of a layer that no memory holds.

    Whoever computes with one gets the values: they are gathered from the blocks then.

    Attributes:
        step: what this was made for.
        gather_all: the values as an ordinary tensor.
    """

    step: Any
    gather_all: Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _PLAIN():
            if func in _TOLD:
                return func(*args, **(kwargs or {}))
            return func(*_gathered(args), **_gathered(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"<cached states {list(self.shape)}>"


def cached_states(
    shape: tuple[int, ...], like: torch.Tensor, step: Any, gather: Callable[[], torch.Tensor]
) -> CachedStates:
    """States of a shape, with the dtype and on the device of others; NaN, should anybody look past what this class
    answers.
    """
    with _PLAIN():
        states = like.new_full((1,) * len(shape), torch.nan).expand(shape).as_subclass(CachedStates)
    states.step, states.gather_all = step, gather
    return states


def _gathered(value: Any) -> Any:
    if type(value) is CachedStates:
        return value.gather_all()
    if type(value) in (tuple, list):
        return type(value)(_gathered(item) for item in value)
    if type(value) is dict:
        return {name: _gathered(item) for name, item in value.items()}
    return value
