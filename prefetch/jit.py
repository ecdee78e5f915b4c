"""How functions are compiled here: C's arithmetic, and a cache on disk whose keys have a digest of all sources.

They keep the GIL: they take microseconds, and a thread that gives it up waits for whoever takes it.

As in `cpu_kernels.jit`, which is on the same floor: Numba looks at the file of the outermost function only, and would
reuse a function whose inner ones have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

# Compiled into whatever calls it.
inner: Any = njit(error_model="numpy")

# Likewise; numbers are never NaN, and minima and sums may be taken in any order, so that vectors take them.
inner_unordered: Any = njit(error_model="numpy", fastmath={"nnan", "nsz", "reassoc"})

_Cache: Any = FunctionCache


def entry(signature: str) -> Any:
    """Decorator of a function that Python calls, compiled when its module is imported."""

    def decorate(function: Any) -> Any:
        dispatcher: Any = njit(error_model="numpy")(function)
        dispatcher._cache = _StampedCache(function)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate


@cache
def source_stamp() -> str:
    """Digest of this package's sources, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for source in _sources(files("prefetch")):
        digest.update(source)
    return digest.hexdigest()[:16]


def _sources(folder: Traversable) -> Iterator[bytes]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry.read_bytes()


def direct(dispatcher: Any) -> Any:
    """The compiled function behind an `entry`, without the look at all arguments' types that takes part of each call.

    Only for arrays that the caller made: elements of a wrong size or number of dimensions are refused, integers in
    place of floats and gaps between elements are not.
    """
    (compiled,) = dispatcher.overloads.values()
    return compiled.entry_point


class _StampedCache(_Cache):  # type: ignore[misc]
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), source_stamp())
