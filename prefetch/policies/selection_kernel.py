# mypy: allow-untyped-calls
"""The resident keys of least value, found in one pass."""

from __future__ import annotations

from typing import Any

from prefetch.jit import entry, inner


@inner
def _before(one: int, other: int, values: Any, used_at: Any) -> bool:
    """Whether `one` goes before `other`: less value, then longer unused, then the smaller key."""
    if values[one] != values[other]:
        return bool(values[one] < values[other])
    if used_at[one] != used_at[other]:
        return bool(used_at[one] < used_at[other])
    return one < other


@inner
def _sift_down(heap: Any, start: int, count: int, values: Any, used_at: Any) -> None:
    """Restore a heap whose root goes last."""
    place = start
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and _before(heap[child], heap[child + 1], values, used_at):
            child += 1
        if not _before(heap[place], heap[child], values, used_at):
            return
        heap[place], heap[child] = heap[child], heap[place]
        place = child


@entry("int64(float64[::1], int64[::1], int64[::1], int64, boolean[::1], int64[::1], int64[::1])")
def least(
    values: Any, used_at: Any, members: Any, count: int, held: Any, pinned: Any, found: Any
) -> int:  # fmt: skip
    """The keys to evict first, in order: a heap of the best so far, then sorted.

    Args:
        values: float64 [keys].
        used_at: int64 [keys].
        members: int64 [keys]; the resident keys are members[:count], in any order.
        count: resident keys.
        held: bool [keys], all False before and after.
        pinned: int64 [P], keys that are not to be found.
        found: int64 [n], filled from the first.

    Returns:
        How many were found.
    """
    for key in pinned:
        held[key] = True
    size = 0
    for index in range(count):
        key = members[index]
        if held[key]:
            continue
        if size < len(found):
            found[size] = key
            size += 1
            if size == len(found):
                for place in range(size // 2 - 1, -1, -1):
                    _sift_down(found, place, size, values, used_at)
        elif _before(key, found[0], values, used_at):
            found[0] = key
            _sift_down(found, 0, size, values, used_at)
    for key in pinned:
        held[key] = False
    if size < len(found):
        for place in range(size // 2 - 1, -1, -1):
            _sift_down(found, place, size, values, used_at)
    for last in range(size - 1, 0, -1):
        found[0], found[last] = found[last], found[0]
        _sift_down(found, 0, last, values, used_at)
    return size
