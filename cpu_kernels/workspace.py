"""Scratch memory of a thread, kept from one call of a kernel to the next."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

_LARGEST_KEPT_BYTES = 64 << 20
_CACHE_LINE_BYTES = 64
_thread = threading.local()


def workspace(nbytes: int) -> npt.NDArray[np.int64]:
    """At least `nbytes` of scratch, aligned to a cache line; the same memory for every call of a thread."""
    kept: npt.NDArray[np.int64] | None = getattr(_thread, "workspace", None)
    if kept is not None and kept.nbytes >= nbytes:
        return kept
    storage = np.empty(nbytes + nbytes // 2 + _CACHE_LINE_BYTES, np.uint8)
    start = -storage.ctypes.data % _CACHE_LINE_BYTES
    aligned = storage[start : start + (len(storage) - start) // 8 * 8].view(np.int64)
    if aligned.nbytes <= _LARGEST_KEPT_BYTES:
        _thread.workspace = aligned
    return aligned
