# mypy: allow-untyped-calls
"""The resident keys of least value, found in one pass over all keys in order: memory is read as it lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner, inner_unordered

TIE = 1e-12
"""Of equal values the one unused for longest goes first: a use counts so much more than the one before."""


@inner_unordered
def _minimum(live: Any, first: int, end: int) -> Any:
    least = live[first]
    for key in range(first + 1, end):
        least = min(least, live[key])
    return least


@entry("float64(float64[::1], int64[::1], boolean[::1], float64[::1], int64, int64)")
def refresh(values: Any, used_at: Any, resident: Any, live: Any, first: int, end: int) -> float:
    """live[key] = values[key], a little more for what was used later, and infinity for what is not resident.

    Args:
        values: float64 [keys].
        used_at: int64 [keys].
        resident: bool [keys].
        live: float64 [keys]; written from key `first` to `end`, exclusively.
        first: a key.
        end: a key.

    Returns:
        The least that was written.
    """
    for key in range(first, end):
        live[key] = values[key] + TIE * used_at[key] if resident[key] else np.inf
    return float(_minimum(live, first, end))


@entry("boolean(float64[::1], int64[::1], boolean[::1], float64[::1], float64[::1], int64, int64)")
def insert(values: Any, used_at: Any, resident: Any, live: Any, bounds: Any, layer: int, key: int) -> bool:
    """`key` of `layer` is resident from now on; whether it was not before. Arguments as of `refresh` and `least`."""
    if resident[key]:
        return False
    resident[key] = True
    live[key] = values[key] + TIE * used_at[key]
    bounds[layer] = min(bounds[layer], live[key])
    return True


@entry("boolean(boolean[::1], float64[::1], int64)")
def evict(resident: Any, live: Any, key: int) -> bool:
    """`key` is not resident from now on; whether it was before."""
    if not resident[key]:
        return False
    resident[key] = False
    live[key] = np.inf
    return True


@inner
def _later(one: int, other: int, scaled: Any) -> bool:
    """Whether `one` is evicted after `other`: more value, then the larger key."""
    return bool(scaled[one] > scaled[other] or (scaled[one] == scaled[other] and one > other))


@inner
def _sift_down(heap: Any, start: int, count: int, scaled: Any) -> None:
    """Restore a heap whose root is evicted last."""
    place = start
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and _later(heap[child + 1], heap[child], scaled):
            child += 1
        if not _later(heap[child], heap[place], scaled):
            return
        heap[place], heap[child] = heap[child], heap[place]
        place = child


@inner
def _heapify(heap: Any, count: int, scaled: Any) -> None:
    for place in range(count // 2 - 1, -1, -1):
        _sift_down(heap, place, count, scaled)


@inner
def _next_layer(bounds: Any, layer_scale: Any, seen: Any) -> int:
    """The layer that may hold the least value, of those not seen; -1 where all are."""
    best = -1
    for layer in range(len(bounds)):
        if not seen[layer] and (best < 0 or bounds[layer] * layer_scale[layer] < bounds[best] * layer_scale[best]):
            best = layer
    return best


@entry("int64(float64[::1], float64[::1], float64[::1], float64[::1], int64[::1], int64[::1], int64[::1])")
def least(
    live: Any, bounds: Any, scaled: Any, layer_scale: Any, first_keys: Any, pinned: Any, found: Any
) -> int:  # fmt: skip
    """The keys to evict first, in order: a heap of the best so far, then sorted.

    Args:
        live: float64 [keys], infinity for keys that are not resident; the same before and after.
        bounds: float64 [layers], no more than the least of each layer in `live`; made exact where it is looked at.
        scaled: float64 [keys], scratch: value x scale of the key's layer, which is what is compared.
        layer_scale: float64 [layers], above 0.
        first_keys: int64 [layers + 1].
        pinned: int64 [P], keys that are not to be found; others than those of the model are ignored.
        found: int64 [n], filled from the first; n is at least 1.

    Returns:
        How many were found.
    """
    held = np.full(len(pinned), np.inf)
    for index in range(len(pinned)):
        if 0 <= pinned[index] < len(live):
            held[index] = live[pinned[index]]
            live[pinned[index]] = np.inf
    size, most = 0, np.inf
    seen = np.zeros(len(bounds), np.bool_)
    for _ in range(len(bounds)):
        layer = _next_layer(bounds, layer_scale, seen)
        # Keys of equal value go by number, so a layer that only equals the last one found is looked at.
        if bounds[layer] * layer_scale[layer] > most or bounds[layer] == np.inf:
            break
        seen[layer] = True
        first, end, scale = first_keys[layer], first_keys[layer + 1], layer_scale[layer]
        bounds[layer] = _minimum(live, first, end)
        for key in range(first, end):
            value = live[key] * scale
            if value > most or value == np.inf:
                continue
            scaled[key] = value
            if size < len(found):
                found[size] = key
                size += 1
                if size == len(found):
                    _heapify(found, size, scaled)
            elif _later(found[0], key, scaled):
                found[0] = key
                _sift_down(found, 0, size, scaled)
            if size == len(found):
                most = scaled[found[0]]
    for index in range(len(pinned) - 1, -1, -1):
        key = pinned[index]
        if 0 <= key < len(live) and held[index] < np.inf:
            live[key] = held[index]
            layer = np.searchsorted(first_keys, key, side="right") - 1
            bounds[layer] = min(bounds[layer], held[index])
    if size < len(found):
        _heapify(found, size, scaled)
    for last in range(size - 1, 0, -1):
        found[0], found[last] = found[last], found[0]
        _sift_down(found, 0, last, scaled)
    return size
