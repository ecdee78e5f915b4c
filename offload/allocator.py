"""The C library's allocator, told to give large blocks back when they are freed.

glibc keeps what is freed as long as it grows its threshold: after the first freed tensor of up to 32 MB it takes all of
that size from its heap, between other blocks, and returns them hardly ever. What a process holds then depends on the
order of its allocations, and a plan could not state it.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

KEPT_NBYTES = 8 << 20
"""Blocks from this size on are mapped one by one, unless a heap has a free piece of that size; smaller ones come from
heaps, which costs no page faults."""

_M_MMAP_THRESHOLD = -3
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@lru_cache(maxsize=1)
def return_large_blocks() -> bool:
    """Fix the size from which blocks are mapped, for the process; False where the user chose it or it is not glibc."""
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_NBYTES))
