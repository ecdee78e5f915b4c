"""How functions are compiled here: no GIL, C's arithmetic, and a cache on disk."""

from __future__ import annotations

from typing import Any

from numba import njit

# Compiled into whatever calls it.
inner: Any = njit(error_model="numpy", nogil=True)

# Likewise; numbers are never NaN, and minima and sums may be taken in any order, so that vectors take them.
inner_unordered: Any = njit(error_model="numpy", nogil=True, fastmath={"nnan", "nsz", "reassoc"})


def entry(signature: str) -> Any:
    """Decorator of a function that Python calls, compiled when its module is imported."""
    return njit(signature, cache=True, error_model="numpy", nogil=True)
