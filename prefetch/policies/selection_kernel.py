# mypy: allow-untyped-calls
"""The resident keys of least value, found in one pass over all keys in order: memory is read as it lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner, inner_unordered

# Rows of a policy's table, float64 [rows, keys].
VALUE, FIXED, USED_AT, COST, LAYER_OF, LIVE, SCALED, ROWS = range(8)
"""VALUE x the scale of the key's layer + FIXED is what is compared; USED_AT counts visits of layers; COST is what a
miss costs, 1 on average; LAYER_OF is the key's layer; LIVE is VALUE, and infinity for keys that are not resident;
SCALED is scratch."""

# Rows of what is kept by layer, float64 [rows, layers].
SCALE, LEAST_NEAR, LEAST_FAR, HELD, LAYER_ROWS = range(5)
"""SCALE lies between the two scales below. HELD is how many keys are resident. The others are no more than the least
of the resident keys would be at either, and exact where they were last looked at. The least of straight lines bends
down, so between the two scales it is nowhere below the straight line from one to the other."""

_NEAR, _FAR = 0.5, 4.0

_ROUNDED = 1.0 - 1e-14
"""What is interpolated may be this much too large."""

# The first places of what `select` is told: how many moves, changed layers and pinned keys follow, and how many keys
# are to be found.
MOVES, CHANGES, PINNED, WANTED, TOLD = range(5)

TIE = 1e-12
"""Of equal values the one unused for longest goes first: a use counts so much more than the one before."""


@inner_unordered
def _least_at(scale: float, live: Any, fixed: Any) -> Any:
    # Four minima beside each other: of one, each would wait for the one before.
    first = second = third = fourth = np.inf
    whole = len(live) // 4
    for quarter in range(whole):
        place: Any = np.uint64(4 * quarter)
        first = min(first, scale * live[place] + fixed[place])
        place += np.uint64(1)
        second = min(second, scale * live[place] + fixed[place])
        place += np.uint64(1)
        third = min(third, scale * live[place] + fixed[place])
        place += np.uint64(1)
        fourth = min(fourth, scale * live[place] + fixed[place])
    for left in range(4 * whole, len(live)):
        first = min(first, scale * live[left] + fixed[left])
    return min(min(first, second), min(third, fourth))


@inner
def _find_bounds(table: Any, per_layer: Any, layer: int, first: int, end: int) -> None:
    """Exact bounds of a layer; infinity where no key is resident."""
    live, fixed = table[LIVE, first:end], table[FIXED, first:end]
    per_layer[LEAST_NEAR, layer], per_layer[LEAST_FAR, layer] = (
        _least_at(_NEAR, live, fixed),
        _least_at(_FAR, live, fixed),
    )


@inner
def _limit(per_layer: Any, layer: int) -> Any:
    """No more than what the layer's least resident key is worth; infinity where there is none."""
    near, far = per_layer[LEAST_NEAR, layer], per_layer[LEAST_FAR, layer]
    if near == np.inf:
        return np.inf
    return (near + (far - near) * (per_layer[SCALE, layer] - _NEAR) / (_FAR - _NEAR)) * _ROUNDED


@inner_unordered
def _scale_layer(live: Any, fixed: Any, scaled: Any, scale: float) -> None:
    for place in range(len(live)):
        scaled[place] = live[place] * scale + fixed[place]


@inner_unordered
def _value_resident(live: Any, value: Any, used_at: Any) -> None:
    for place in range(len(live)):
        now = value[place] + TIE * used_at[place]
        live[place] = now if live[place] < np.inf else np.inf


@inner
def refresh(table: Any, per_layer: Any, layer: int, first: int, end: int) -> None:
    """LIVE = VALUE, a little more for what was used later; it stays infinity for what is not resident."""
    _value_resident(table[LIVE, first:end], table[VALUE, first:end], table[USED_AT, first:end])
    _find_bounds(table, per_layer, layer, first, end)


@inner
def _live_value(table: Any, key: int) -> Any:
    return table[VALUE, key] + TIE * table[USED_AT, key]


@inner
def _lower_bounds(table: Any, per_layer: Any, key: int) -> None:
    """`key` is among those that can be found."""
    layer = int(table[LAYER_OF, key])
    for row, scale in ((LEAST_NEAR, _NEAR), (LEAST_FAR, _FAR)):
        per_layer[row, layer] = min(per_layer[row, layer], scale * table[LIVE, key] + table[FIXED, key])


@inner
def update(table: Any, per_layer: Any, first_keys: Any, moved: Any, layers: Any) -> None:
    """Bring LIVE and the bounds up to date with keys that came or left and layers whose values changed."""
    for change in moved:
        if change < 0:
            table[LIVE, -1 - change] = np.inf
            per_layer[HELD, int(table[LAYER_OF, -1 - change])] -= 1.0
        else:
            table[LIVE, change] = _live_value(table, change)
            per_layer[HELD, int(table[LAYER_OF, change])] += 1.0
            _lower_bounds(table, per_layer, change)
    for layer in layers:
        refresh(table, per_layer, layer, first_keys[layer], first_keys[layer + 1])


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


@inner
def _look_through(
    table: Any, per_layer: Any, layer: int, first: int, end: int, found: Any, size: int, most: float
) -> Any:
    """The best of a layer join the heap of the best so far; (how many there are, the worst of a full heap)."""
    live, fixed, scaled = table[LIVE], table[FIXED], table[SCALED]
    scale = per_layer[SCALE, layer]
    _find_bounds(table, per_layer, layer, first, end)
    _scale_layer(live[first:end], fixed[first:end], scaled[first:end], scale)
    for key in range(first, end):
        if scaled[key] > most or scaled[key] == np.inf:
            continue
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
    return size, most


@inner
def _least(table: Any, per_layer: Any, first_keys: Any, only: int, found: Any) -> int:
    """Fill `found` with the keys to evict first, in order, of layer `only` or of all (-1); how many there are."""
    layers = per_layer.shape[1]
    size, most = 0, np.inf
    limits = np.empty(layers)
    for layer in range(layers):
        limits[layer] = _limit(per_layer, layer)
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
        first, end = first_keys[layer], first_keys[layer + 1]
        size, most = _look_through(table, per_layer, layer, first, end, found, size, most)
    scaled = table[SCALED]
    if size < len(found):
        _heapify(found, size, scaled)
    for last in range(size - 1, 0, -1):
        found[0], found[last] = found[last], found[0]
        _sift_down(found, 0, last, scaled)
    return size


@inner
def _hide(live: Any, keys: Any, values: Any) -> None:
    """Let keys look as if they were not resident; what they had is in `values`."""
    for index in range(len(keys)):
        values[index] = np.inf
        if 0 <= keys[index] < len(live):
            values[index] = live[keys[index]]
            live[keys[index]] = np.inf


@inner
def _show(table: Any, per_layer: Any, keys: Any, values: Any) -> None:
    """Undo `_hide`; backwards, as a key may be named twice."""
    for index in range(len(keys) - 1, -1, -1):
        if values[index] < np.inf:
            table[LIVE, keys[index]] = values[index]
            _lower_bounds(table, per_layer, keys[index])


@inner
def _furthest_above(above: Any) -> int:
    """The layer with the most experts above its quota, of equal ones the deepest; -1 where none is above."""
    furthest = -1
    for layer in range(len(above)):
        if above[layer] > 0 and (furthest < 0 or above[layer] >= above[furthest]):
            furthest = layer
    return furthest


@inner
def _least_by_quota(table: Any, per_layer: Any, first_keys: Any, quotas: Any, found: Any) -> int:
    """As `_least`, but first from layers that are above their quotas."""
    size, left, values = 0, per_layer[HELD].astype(np.int64) - quotas, np.empty(len(found))
    layer = _furthest_above(left)
    while size < len(found) and layer >= 0:
        end = min(len(found), size + left[layer])
        new = _least(table, per_layer, first_keys, layer, found[size:end])
        left[layer] = 0
        # The layer may be looked at once more.
        _hide(table[LIVE], found[size : size + new], values[size:end])
        size += new
        layer = _furthest_above(left)
    hidden = size
    if size < len(found):
        size += _least(table, per_layer, first_keys, -1, found[size:])
    _show(table, per_layer, found[:hidden], values)
    return size


@inner
def find_least(table: Any, per_layer: Any, first_keys: Any, quotas: Any, pinned: Any, found: Any) -> Any:
    """Fill `found` with the keys to evict first, in order, none of them pinned; how many there are. See `select`."""
    values = np.empty(len(pinned))
    _hide(table[LIVE], pinned, values)
    if len(quotas):
        size = _least_by_quota(table, per_layer, first_keys, quotas, found)
    else:
        size = _least(table, per_layer, first_keys, -1, found)
    _show(table, per_layer, pinned, values)
    return size


@entry("int64(float64[:, ::1], float64[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def select(table: Any, per_layer: Any, first_keys: Any, quotas: Any, told: Any, found: Any) -> Any:
    """Take in what happened since the last call, then find the keys to evict first, in order.

    Args:
        table: float64 [rows, keys], see above; LIVE is updated, the same for pinned and found keys.
        per_layer: float64 [rows, layers], see above; its bounds and HELD are updated.
        first_keys: int64 [layers + 1].
        quotas: int64 [layers], how many experts each layer may hold before others give one up; of no elements where
            there are none.
        told: int64, four numbers, see above, then keys that came, or -1 - key for one that left, in order; layers whose
            values changed; and keys that are not to be found, of which others than those of the model are ignored.
        found: int64 [as many as are wanted, or more], filled from the first.

    Returns:
        How many were found.
    """
    moves, changes = TOLD + told[MOVES], TOLD + told[MOVES] + told[CHANGES]
    update(table, per_layer, first_keys, told[TOLD:moves], told[moves:changes])
    wanted, pinned = found[: told[WANTED]], told[changes : changes + told[PINNED]]
    return find_least(table, per_layer, first_keys, quotas, pinned, wanted)
