"""What an attention mask says beyond that attention is causal."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_ROWS = 128
_FEW_TOKENS = 8
"""Passes of so many new tokens are steps of decode."""


class Padding(NamedTuple):
    """Which cached tokens may be seen at all.

    Attributes:
        valid: bool [B, S].
        all_valid: whether all may.
    """

    valid: npt.NDArray[np.bool_]
    all_valid: bool


_NONE = Padding(np.ones((1, 1), np.bool_), all_valid=True)
_last = threading.local()


def padding_of(mask: torch.Tensor | None, past: int, new: int) -> Padding | None:
    """The padding of a causal mask for the last `new` of `past + new` tokens; None where it is another mask.

    For one new token any mask is one of padding. What rows of padded tokens see does not matter.

    Args:
        mask: [B, 1, new, past + new], True or 0 where a token may be seen, False or very small where not; None: all
            tokens before.
        past: tokens before.
        new: tokens.
    """
    if mask is None:
        return _NONE
    # All layers of a pass get one mask.
    known: tuple[weakref.ref[torch.Tensor], Padding | None] | None = getattr(_last, "known", None)
    if known is None or known[0]() is not mask:
        known = _last.known = weakref.ref(mask), _padding_of(mask, past, new)
    return known[1]


def _padding_of(mask: torch.Tensor, past: int, new: int) -> Padding | None:
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (new, past + new):
        return None
    if new <= _FEW_TOKENS:
        return _padding_of_few(mask[:, 0].cpu(), past)
    valid = _seen(mask[:, 0, -1].cpu())
    if valid is None:
        return None
    at = torch.arange(past + new)
    for first in range(0, new, _ROWS):
        rows = torch.arange(first, min(new, first + _ROWS)) + past
        seen = _seen(mask[:, 0, first : first + _ROWS].cpu())
        if seen is None:
            return None
        expected = valid[:, None] & (at <= rows[:, None])
        if not bool(((seen == expected) | ~valid[:, rows][..., None]).all()):
            return None
    return Padding(valid.numpy(), bool(valid.all()))


def _padding_of_few(mask: torch.Tensor, past: int) -> Padding | None:
    """That of a few rows [B, new, past + new]: in place, or in memory that the thread's next mask writes to."""
    seen = mask if mask.dtype is torch.bool else _seen_in_kept_memory(mask)
    if seen is None:
        return None
    valid = seen[:, -1]
    for number in range(seen.shape[1] - 1):
        end = past + number + 1
        for row, told in zip(seen[:, number], valid, strict=True):
            if bool(told[end - 1]) and not (torch.equal(row[:end], told[:end]) and not bool(row[end:].any())):
                return None
    # Kernels read rows that lie in one piece.
    rows = valid if valid.stride(-1) == 1 else valid.contiguous()
    return Padding(rows.numpy(), bool(rows.all()))


def _seen_in_kept_memory(mask: torch.Tensor) -> torch.Tensor | None:
    """`_seen` of a mask that is not one of bools."""
    kept: torch.Tensor | None = getattr(_last, "memory", None)
    if kept is None or kept.shape[1] < mask.numel():
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            kept = _last.memory = torch.empty(2, 2 * mask.numel(), dtype=torch.bool)
    seen, known = (one[: mask.numel()].view(mask.shape) for one in kept)
    torch.eq(mask, 0, out=seen)
    torch.le(mask, torch.finfo(mask.dtype).min / 2, out=known)
    return seen if bool(known.logical_or_(seen).all()) else None


def _seen(mask: torch.Tensor) -> torch.Tensor | None:
    """Bool of the same shape; None where the mask is a bias."""
    if mask.dtype is torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()) else None
