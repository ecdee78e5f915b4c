"""Rotary position embedding, where an attention's forward calls its module's `apply_rotary_pos_emb`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from cpu_kernels.rotary import rotary
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.conditions import is_plain
from offload.hf.fused.swap import rebind, swap

_NAME = "apply_rotary_pos_emb"

Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse_rotary(model: PreTrainedModel) -> int:
    """Modules whose forward calls the function; returns how many."""
    count = 0
    for module in model.modules():
        forward = _with_kernel(type(module).forward)
        if forward is not None:
            swap(module, forward)
            count += 1
    return count


@cache
def _with_kernel(forward: Any) -> Callable[..., Any] | None:
    original = getattr(forward, "__globals__", {}).get(_NAME)
    return rebind(forward, {_NAME: _fused(original)}) if _rotates_both(original) else None


def _rotates_both(original: Any) -> bool:
    """Whether it takes queries and keys together; others of its name take one of them, and angles in another order."""
    try:
        named = list(signature(original).parameters)
    except (TypeError, ValueError):
        return False
    return named[:4] == ["q", "k", "cos", "sin"]


@cache
def _fused(original: Rotation) -> Rotation:
    """The function, computed by the kernel where that gives its bits."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (
            not rest
            and not named
            and is_plain(q)
            and is_plain(k)
            and is_plain(cos)
            and q.dim() == 4
            and q.stride(3) == 1
            and k.stride(3) == 1
            and cos.dim() == 3
            and cos.is_contiguous()
            and sin.is_contiguous()
        ):
            shared = _shared_angles(original, q.dtype, cos.dtype, q.shape[3], cos.shape[2])
            if shared is not None:
                return rotary(q, k, cos, sin, shared_angles=shared, pool=kernel_pool())
        return original(q, k, cos, sin, *rest, **named)

    return apply_rotary_pos_emb


@cache
def _shared_angles(
    original: Rotation, dtype: torch.dtype, angle_dtype: torch.dtype, width: int, angles: int
) -> bool | None:
    """With which setting the kernel has the function's bits on random input; None with neither."""
    if dtype not in FORMAT_OF_DTYPE or angle_dtype is not dtype:
        return None
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    q, k = random(2, 3, 4, width), random(2, 1, 4, width)
    cos, sin = random(2, 4, angles), random(2, 4, angles)
    try:
        expected = original(q, k, cos, sin)
    except RuntimeError:
        # Shapes that do not go together, of which the function itself shall tell.
        return None
    for shared in (False, True):
        pairs = angles if shared else angles // 2
        if 2 * pairs > width or (not shared and angles % 2):
            continue
        found = rotary(q, k, cos, sin, shared_angles=shared, pool=kernel_pool())
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return shared
    return None
