"""What an attention mask says beyond that attention is causal."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_ROWS = 128


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


def _seen(mask: torch.Tensor) -> torch.Tensor | None:
    """Bool of the same shape; None where the mask is a bias."""
    if mask.dtype is torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()) else None
