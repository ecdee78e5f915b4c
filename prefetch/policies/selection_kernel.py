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


@inner
def _least_fixed(fixed: Any, live: Any, first: int, end: int) -> Any:
    """Of resident keys; infinity where there is none."""
    found = np.inf
    for key in range(first, end):
        if live[key] < np.inf:
            found = min(found, fixed[key])
    return found


@inner
def _refresh(
    values: Any, fixed: Any, used_at: Any, resident: Any, live: Any, bounds: Any, layer: int, first: int, end: int
) -> None:
    """live[key] = values[key], a little more for what was used later, and infinity for what is not resident."""
    for key in range(first, end):
        live[key] = values[key] + TIE * used_at[key] if resident[key] else np.inf
    bounds[0, layer] = _minimum(live, first, end)
    bounds[1, layer] = _least_fixed(fixed, live, first, end)


@entry(
    "void(float64[::1], float64[::1], int64[::1], boolean[::1], float64[::1], float64[:, ::1], int64[::1], int64[::1], "
    "int64[::1], int64[::1])"
)
def update(
    values: Any, fixed: Any, used_at: Any, resident: Any, live: Any, bounds: Any, layer_of: Any, first_keys: Any,
    moved: Any, layers: Any,
) -> None:  # fmt: skip
    """Bring `live` and `bounds` up to date with keys that came or left and layers whose values changed.

    Args:
        values: float64 [keys].
        fixed: float64 [keys], see `least`.
        used_at: int64 [keys].
        resident: bool [keys]; updated.
        live: float64 [keys]; updated.
        bounds: float64 [2, layers], see `least`; updated.
        layer_of: int64 [keys].
        first_keys: int64 [layers + 1].
        moved: int64 [n]: a key that is resident from now on, or -1 - key for one that is not any more; in order.
        layers: int64 [m], whose values changed.
    """
    for change in moved:
        if change < 0:
            resident[-1 - change] = False
            live[-1 - change] = np.inf
            continue
        layer = layer_of[change]
        resident[change] = True
        live[change] = values[change] + TIE * used_at[change]
        bounds[0, layer] = min(bounds[0, layer], live[change])
        bounds[1, layer] = min(bounds[1, layer], fixed[change])
    for layer in layers:
        _refresh(values, fixed, used_at, resident, live, bounds, layer, first_keys[layer], first_keys[layer + 1])


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
def _next_layer(limits: Any, seen: Any) -> int:
    """The layer that may hold the least value, of those not seen; -1 where all are."""
    best = -1
    for layer in range(len(limits)):
        if not seen[layer] and (best < 0 or limits[layer] < limits[best]):
            best = layer
    return best


@entry(
    "int64(float64[::1], float64[::1], float64[:, ::1], float64[::1], float64[::1], int64[::1], int64, int64[::1], "
    "int64[::1])"
)
def least(
    live: Any, fixed: Any, bounds: Any, scaled: Any, layer_scale: Any, first_keys: Any, only: int, pinned: Any,
    found: Any,
) -> int:  # fmt: skip
    """The keys to evict first, in order: a heap of the best so far, then sorted.

    Args:
        live: float64 [keys], infinity for keys that are not resident; the same before and after.
        fixed: float64 [keys], what is added to a value once it is scaled.
        bounds: float64 [2, layers], no more than the least of each layer in `live`, and in `fixed` of resident keys;
            made exact where it is looked at.
        scaled: float64 [keys], scratch: value x scale of the key's layer + fixed, which is what is compared.
        layer_scale: float64 [layers], above 0.
        first_keys: int64 [layers + 1].
        only: the layer that keys are to be of, -1 for any.
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
    size, most, layers = 0, np.inf, len(layer_scale)
    limits = np.empty(layers)
    for layer in range(layers):
        # Where none is resident both are infinite.
        limits[layer] = bounds[0, layer] * layer_scale[layer] + bounds[1, layer]
    seen = np.full(layers, only >= 0)
    if only >= 0:
        seen[only] = False
    for _ in range(layers):
        layer = _next_layer(limits, seen)
        if layer < 0 or limits[layer] > most or limits[layer] == np.inf:
            break
        # Keys of equal value go by number: of equal layers the first is looked at, and later ones have larger keys.
        if limits[layer] == most and first_keys[layer] > found[0]:
            break
        seen[layer] = True
        first, end, scale = first_keys[layer], first_keys[layer + 1], layer_scale[layer]
        bounds[0, layer] = _minimum(live, first, end)
        bounds[1, layer] = _least_fixed(fixed, live, first, end)
        for key in range(first, end):
            value = live[key] * scale + fixed[key]
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
            bounds[0, layer] = min(bounds[0, layer], held[index])
            bounds[1, layer] = min(bounds[1, layer], fixed[key])
    if size < len(found):
        _heapify(found, size, scaled)
    for last in range(size - 1, 0, -1):
        found[0], found[last] = found[last], found[0]
        _sift_down(found, 0, last, scaled)
    return size
