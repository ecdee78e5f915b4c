# mypy: allow-untyped-calls
"""What reading ahead decides at a layer: predictions, values by them, and what to cancel, to read and to evict."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner
from prefetch.policies.forecast_kernel import LANES, PROBABILITY, at, known_of, value_foretold
from prefetch.policies.selection_kernel import FIXED, LAYER_OF, LIVE, SCALE, VALUE, find_least, refresh, update
from prefetch.predictors.combine_kernel import predict

# The first places of what `foresee` is told. MOVES, CHANGES, PINNED and READING are how many of each follow, in this
# order; see `foresee`. Then the layer, for how many next ones routers spoke, whether they are to be predicted, how many
# reads ahead are on their way, how many that are needed now, how many more reads ahead may be, and how many slots are
# free.
MOVES, CHANGES, PINNED, READING, LAYER, AHEAD, PREDICTS, WAITING, URGENT, ROOM, FREE, TOLD = range(12)

# The first places of what it finds: how many unlikely keys, keys to read and victims follow, in this order.
UNLIKELY, CHOSEN, VICTIMS, FOUND = range(4)

# Limits: least probability of what is read, of what waits for others, and of what goes on being read; seconds of a read
# and of a layer.
LEAST, SURE, CANCEL_BELOW, READ_S, LAYER_S, LIMITS = range(6)


@inner
def _hear(layer: int, ahead: int, said: Any, counts: Any, heard: Any, expected: Any, known: Any, layers: Any) -> None:
    """What routers and the policy itself say of the next layers, as `predict` takes it."""
    for place in range(ahead):
        target = layer + 1 + place
        here, _ = known_of(known, layers, target, counts[target])
        for expert in range(counts[target]):
            heard[place, expert] = said[1 + place, expert]
            expected[place, expert] = here[at(expert // LANES, PROBABILITY, expert % LANES)]


@inner
def _worth(table: Any, per_layer: Any, key: int) -> Any:
    return table[VALUE, key] * per_layer[SCALE, int(table[LAYER_OF, key])] + table[FIXED, key]


@inner
def _find_unlikely(
    layer: int, ahead: int, depth: int, reading: Any, table: Any, first_keys: Any, probabilities: Any, limits: Any,
    found: Any,
) -> int:  # fmt: skip
    """Fill `found` with what is to be read no longer: what is not expected any more, and what is not sure and has not
    been begun, which may be chosen again; how many there are.
    """
    size = 0
    for word in reading:
        key = word if word >= 0 else -1 - word
        below = limits[CANCEL_BELOW] if word >= 0 else limits[SURE]
        target = int(table[LAYER_OF, key])
        distance = target - layer
        likely = 1 <= distance <= ahead
        if likely:
            likely = probabilities[target * depth + distance - 1, key - first_keys[target]] >= below
        if not likely:
            found[size] = key
            size += 1
    return size


@inner
def _list_candidates(
    layer: int, ahead: int, depth: int, counts: Any, table: Any, first_keys: Any, probabilities: Any, least: float,
    keys: Any, ranks: Any,
) -> int:  # fmt: skip
    """Fill `keys` with what is probable and not resident, the most probable of the nearest layer first; how many."""
    size = 0
    for distance in range(1, ahead + 1):
        target = layer + distance
        row, first = target * depth + distance - 1, first_keys[target]
        for expert in range(counts[target]):
            probability = probabilities[row, expert]
            if probability < least or table[LIVE, first + expert] < np.inf:
                continue
            rank, place = probability / (distance + 1), size
            while place > 0 and ranks[place - 1] < rank:
                ranks[place], keys[place] = ranks[place - 1], keys[place - 1]
                place -= 1
            ranks[place], keys[place] = rank, first + expert
            size += 1
    return size


@inner
def _keep_those_in_time(
    layer: int,
    depth: int,
    told: Any,
    limits: Any,
    table: Any,
    first_keys: Any,
    probabilities: Any,
    keys: Any,
    size: int,
) -> int:
    """Leave those of `keys` for which there is room and that can be begun before their layer comes; how many.

    What would not be begun before the next layer's turn to choose, which knows more, must be sure.
    """
    kept = 0
    for place in range(size):
        target = int(table[LAYER_OF, keys[place]])
        until_s = (target - layer) * limits[LAYER_S]
        before = told[WAITING] + kept
        late = before * limits[READ_S] > until_s and until_s > 0.0
        waits = (before + told[URGENT]) * limits[READ_S] > limits[LAYER_S]
        sure = probabilities[target * depth + target - layer - 1, keys[place] - first_keys[target]] >= limits[SURE]
        if kept < told[ROOM] and not late and (sure or not waits):
            keys[kept] = keys[place]
            kept += 1
    return kept


@inner
def _keep_those_that_gain(table: Any, per_layer: Any, keys: Any, size: int, free: int, victims: Any, most: int) -> Any:
    """Leave those of `keys` for which a slot is free or that are worth more than their victims; (how many, victims)."""
    kept, gone = min(size, free), 0
    for place in range(kept, size):
        if gone == most:
            break
        if _worth(table, per_layer, keys[place]) > _worth(table, per_layer, victims[gone]):
            keys[kept] = keys[place]
            kept += 1
            gone += 1
    return kept, gone


@entry(
    "void(int64[::1], float64[::1], float32[:, ::1], int64[::1], int64[::1], "
    "int64[::1], int64[::1], float64[:, ::1], float64[:, ::1], int64[::1], float64[:, ::1], float64[:, ::1], "
    "float64[:, ::1], float64[:, :, ::1], float64[:, ::1], float64[:, ::1], float32[::1], int64[::1], "
    "float64[::1], float64[:, ::1], float64[:, ::1], int64[::1], int64[::1], float32[::1], int64[:, ::1], float64[::1])"
)
def foresee(
    told: Any, limits: Any, said: Any, active: Any, found: Any,
    counts: Any, top_k: Any, heard: Any, expected: Any, starts: Any, uses: Any, weights: Any, offsets: Any, inputs: Any,
    said_before: Any, probabilities: Any, transitions: Any, made: Any, sources: Any,
    table: Any, per_layer: Any, first_keys: Any, quotas: Any, known: Any, layers: Any, rates: Any,
) -> None:  # fmt: skip
    """Predict the next layers and choose what to read ahead, or what to end first.

    Where something is to be read no longer, that alone is found: whoever ends it asks again without predicting and
    without naming what is being read.

    Args:
        told: int64, numbers, see above; then keys that came, or -1 - key for one that left, in order; layers whose
            values changed; keys that must stay; and keys that are being read ahead, or -1 - key where that has not been
            begun.
        limits: float64 [LIMITS], see above.
        said: float32 [1 + next layers, most experts], what routers say, from the layer's own on.
        active: int64 [n], experts of the layer that the token goes to.
        found: int64, numbers, see above, and keys; room for as many of each as there are in the layers ahead, and being
            read.
        counts: see `combine_kernel.predict`, as are the next thirteen.
        top_k: likewise.
        heard: float64 [depth, most experts]: `logits` there, filled.
        expected: likewise, filled.
        starts: likewise.
        uses: likewise.
        weights: likewise.
        offsets: likewise.
        inputs: likewise.
        said_before: `said` there.
        probabilities: likewise.
        transitions: likewise.
        made: likewise.
        sources: likewise.
        table: see `selection_kernel`.
        per_layer: see `selection_kernel`.
        first_keys: int64 [layers + 1].
        quotas: see `selection_kernel.select`.
        known: see `forecast_kernel.visit_layer`.
        layers: likewise.
        rates: likewise.
    """
    layer, ahead, depth = told[LAYER], told[AHEAD], len(made) // len(counts)
    moved = TOLD + told[MOVES]
    changed = moved + told[CHANGES]
    pinned = changed + told[PINNED]
    if told[PREDICTS]:
        _hear(layer, ahead, said, counts, heard, expected, known, layers)
        predict(
            layer, 1, 1 + ahead, counts, top_k, heard, expected, active, starts, uses, weights, offsets, inputs,
            said_before, probabilities, transitions, made, sources,
        )  # fmt: skip
        for target in range(layer + 1, layer + 1 + ahead):
            row = target * depth + target - layer - 1
            value_foretold(target, probabilities[row, : counts[target]], table, first_keys, known, layers, rates)
    update(table, per_layer, first_keys, told[TOLD:moved], told[moved:changed])
    if told[PREDICTS]:
        for target in range(layer + 1, layer + 1 + ahead):
            refresh(table, per_layer, target, first_keys[target], first_keys[target + 1])
    found[UNLIKELY] = _find_unlikely(
        layer, ahead, depth, told[pinned : pinned + told[READING]], table, first_keys, probabilities,
        limits, found[FOUND:],
    )  # fmt: skip
    found[CHOSEN] = found[VICTIMS] = 0
    if found[UNLIKELY] > 0:
        return
    most = 0
    for target in range(layer + 1, layer + 1 + ahead):
        most += counts[target]
    keys, victims = found[FOUND : FOUND + most], np.empty(most, np.int64)
    size = _list_candidates(
        layer, ahead, depth, counts, table, first_keys, probabilities, limits[LEAST], keys, np.empty(most)
    )
    size = _keep_those_in_time(layer, depth, told, limits, table, first_keys, probabilities, keys, size)
    wanted = max(size - told[FREE], 0)
    there = 0
    if wanted > 0:
        there = find_least(table, per_layer, first_keys, quotas, told[changed:pinned], victims[:wanted])
    size, gone = _keep_those_that_gain(table, per_layer, keys, size, told[FREE], victims, there)
    found[CHOSEN], found[VICTIMS] = size, gone
    found[FOUND + size : FOUND + size + gone] = victims[:gone]
