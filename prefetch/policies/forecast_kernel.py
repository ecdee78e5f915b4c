# mypy: allow-untyped-calls
"""Learning how probably each expert of a layer is needed next, online, by logistic regression.

What is known of a layer's experts lies together, some experts at a time and all numbers of these after one another, so
that one loop goes through it as memory lies and no vector waits for another's address.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner, inner_unordered
from prefetch.policies.selection_kernel import COST, FIXED, SCALE, VALUE
from prefetch.policies.visit_kernel import END, FIRST, LAYER, keys_of, note_use
from prefetch.vector_math_kernel import log_of, sigmoid_of

LANES = 64
"""Experts of a block; a layer's last block may have some that are none."""

# Rows of what is known of each expert, float32 [blocks, ROWS, LANES], flat so that distances between rows are known to
# the compiler. LONG, MIDDLE and SHORT are shares of visits that needed it, decayed; SINCE is visits since the last
# decoded use. The next five are what the regression gets of it: log-odds of the shares, LAST, whether the last decoded
# token needed it, and log(1 + SINCE). Then what it says, and LATER: mean 1 / (passes until it is needed +
# PATIENCE_PASSES) if the next visit does not need it, for the share of LONG that do.
LONG, MIDDLE, SHORT, SINCE, LONG_ODDS, MIDDLE_ODDS, SHORT_ODDS, LAST, LOG_SINCE, PROBABILITY, LATER, ROWS = range(12)

_BLOCK = ROWS * LANES

SPARE_LINES = 2
"""Of a visit, for all layers in the same place, as long as the blocks of the largest: see `_spare_lines`."""

BIAS, INPUTS = 5, 6
"""Inputs: the five, and 1."""

# Columns of what is known of a layer, int64 [layers, COLUMNS + 4 x the experts of the largest]: where its links start,
# how many sources it has, which, how many experts the last decoded token used, how many rows of links spoke last, and
# its first block. The used experts and the rows follow.
LINKS, SOURCES, SOURCE, USED, SPOKE, FIRST_BLOCK, COLUMNS = 0, 1, 2, 5, 6, 7, 8

# Rates: decays of LONG, MIDDLE and SHORT for one visit, learning rates of weights and of links, and what LATER counts.
WEIGHT_RATE, LINK_RATE, LATER_SHARE, RATES = 3, 4, 5, 6

_LEAST, _MOST = np.float32(1e-3), np.float32(1.0 - 1e-3)
"""Nothing is certain."""

MOST_ROWS = 32.0
"""So many used sources speak in full; of more, each speaks less."""

_FLOOR, _CEILING = np.float32(0.01), np.float32(0.99)
"""Of shares whose odds are taken."""

_ZERO, _ONE = np.float32(0), np.float32(1)

PATIENCE_PASSES = 0.3
"""Added to every time, so that the next layer does not count for all."""

_STEPS = 128
_VISITS = 200


def _later_table() -> np.ndarray:
    """Float64 [_STEPS + 2]: mean 1 / (time + patience) of an expert that each visit needs with probability
    index / _STEPS, from the visit after the next, which is a pass and a half away on average.
    """
    shares = np.minimum(np.arange(_STEPS + 2) / _STEPS, 1.0)[:, None]
    visits = np.arange(_VISITS)
    table: np.ndarray = np.sum(shares * (1.0 - shares) ** visits / (1.5 + visits + PATIENCE_PASSES), axis=1)
    return table


_STEPS_FLOAT = np.float32(_STEPS)
_LATER = _later_table().astype(np.float32)


@inner
def _voice(rows: Any) -> Any:
    """Several sequences' experts speak together as loudly as one's."""
    return min(1.0, MOST_ROWS / max(len(rows), 1))


@inner
def at(block: int, row: int, lane: int) -> Any:
    """Where a layer's known numbers have one. Unsigned: loops need no look at whether it counts from the end."""
    return np.uint64((block * ROWS + row) * LANES + lane)


@inner
def _in_line(block: int, lane: int) -> Any:
    return np.uint64(block * LANES + lane)


@inner
def _spare_lines(spare: Any, blocks: int) -> Any:
    """Float32 [blocks x LANES] each: whether each expert is needed now, and an error or log-odds of it."""
    most, size = len(spare) // SPARE_LINES, blocks * LANES
    return spare[:size], spare[most : most + size]


@inner_unordered
def _find_errors(known: Any, blocks: int, experts: int, need: Any, error: Any) -> None:
    for block in range(blocks):
        for lane in range(LANES):
            place = _in_line(block, lane)
            error[place] = need[place] - known[at(block, PROBABILITY, lane)]
    for expert in range(experts, blocks * LANES):
        error[expert] = _ZERO


@inner_unordered
def _sum_products(known: Any, blocks: int, row: int, error: Any) -> Any:
    """Sum of error x a row."""
    total = np.float32(0)
    for block in range(blocks):
        for lane in range(LANES):
            total += error[_in_line(block, lane)] * known[at(block, row, lane)]
    return total


@inner_unordered
def _sum_of(line: Any) -> Any:
    total = np.float32(0)
    for place in range(len(line)):
        total += line[place]
    return total


@inner_unordered
def _add_row(total: Any, row: Any, times: Any) -> None:
    for expert in range(len(total)):
        total[expert] += times * row[expert]


@inner
def _learn(known: Any, blocks: int, weights: Any, links: Any, rows: Any, error: Any, experts: int, rates: Any) -> None:
    """The layer's next visit came: one step of gradient descent on the log loss of what was predicted.

    Error is float32 [blocks x LANES], see `_find_errors`.
    """
    pace = rates[WEIGHT_RATE] / experts
    weights[0] += pace * _sum_products(known, blocks, LONG_ODDS, error)
    weights[1] += pace * _sum_products(known, blocks, MIDDLE_ODDS, error)
    weights[2] += pace * _sum_products(known, blocks, SHORT_ODDS, error)
    weights[3] += pace * _sum_products(known, blocks, LAST, error)
    weights[4] += pace * _sum_products(known, blocks, LOG_SINCE, error)
    weights[BIAS] += pace * _sum_of(error[:experts])
    step = np.float32(rates[LINK_RATE] * _voice(rows))
    for row in rows:
        _add_row(links[row * experts : (row + 1) * experts], error[:experts], step)


@inner_unordered
def _odds(share: Any) -> Any:
    """Log-odds, float32."""
    kept = min(max(share, _FLOOR), _CEILING)
    return log_of(kept / (_ONE - kept))


@inner
def _decayed(share: Any, need: Any, kept: Any) -> Any:
    return kept * share + (_ONE - kept) * need


@inner_unordered
def _decay_and_add(known: Any, blocks: int, need: Any, long: Any, middle: Any, short: Any) -> None:
    """Shares of visits and their odds, given what is kept of each. One loop of known rows: none can overlap."""
    for block in range(blocks):
        for lane in range(LANES):
            needed = need[_in_line(block, lane)]
            share = _decayed(known[at(block, LONG, lane)], needed, long)
            known[at(block, LONG, lane)] = share
            known[at(block, LONG_ODDS, lane)] = _odds(share)
            share = _decayed(known[at(block, MIDDLE, lane)], needed, middle)
            known[at(block, MIDDLE, lane)] = share
            known[at(block, MIDDLE_ODDS, lane)] = _odds(share)
            share = _decayed(known[at(block, SHORT, lane)], needed, short)
            known[at(block, SHORT, lane)] = share
            known[at(block, SHORT_ODDS, lane)] = _odds(share)


@inner_unordered
def _note_last(known: Any, blocks: int, need: Any, decode: Any) -> None:
    """A prefill (decode 0, else 1) shows what is popular, not what is recent."""
    for block in range(blocks):
        for lane in range(LANES):
            needed = need[_in_line(block, lane)]
            used = decode if needed > _ZERO else _ZERO
            since = (known[at(block, SINCE, lane)] + decode) * (_ONE - used)
            known[at(block, SINCE, lane)] = since
            known[at(block, LOG_SINCE, lane)] = log_of(since + _ONE)
            known[at(block, LAST, lane)] = decode * needed + (_ONE - decode) * known[at(block, LAST, lane)]


@inner_unordered
def _conclude(
    known: Any, blocks: int, linked: Any, long: Any, middle: Any, short: Any, last: Any, since: Any, bias: Any
) -> None:
    """PROBABILITY from what is linked and what is seen of the expert itself."""
    for block in range(blocks):
        for lane in range(LANES):
            logit = long * known[at(block, LONG_ODDS, lane)] + middle * known[at(block, MIDDLE_ODDS, lane)]
            logit += short * known[at(block, SHORT_ODDS, lane)] + last * known[at(block, LAST, lane)]
            logit = linked[_in_line(block, lane)] + (logit + since * known[at(block, LOG_SINCE, lane)] + bias)
            known[at(block, PROBABILITY, lane)] = min(max(sigmoid_of(logit), _LEAST), _MOST)


@inner
def _predict(known: Any, blocks: int, weights: Any, links: Any, rows: Any, linked: Any, experts: int) -> None:
    """How probably the layer's next visit needs each expert. Linked is float32 [blocks x LANES], filled."""
    voice = np.float32(_voice(rows))
    linked[:] = _ZERO
    for row in rows:
        _add_row(linked[:experts], links[row * experts : (row + 1) * experts], voice)
    _conclude(
        known, blocks, linked, np.float32(weights[0]), np.float32(weights[1]), np.float32(weights[2]),
        np.float32(weights[3]), np.float32(weights[4]), np.float32(weights[BIAS]),
    )  # fmt: skip


@inner
def _find_later(known: Any, blocks: int) -> None:
    """What later visits are worth."""
    for block in range(blocks):
        for lane in range(LANES):
            place = known[at(block, LONG, lane)] * _STEPS_FLOAT
            below = np.uint32(np.int32(place))
            later = _LATER[below] + (place - np.float32(below)) * (_LATER[below + np.uint32(1)] - _LATER[below])
            known[at(block, LATER, lane)] = later


@inner
def _value_block(known: Any, block: int, cost: Any, values: Any, fixed: Any, later_share: float) -> None:
    for lane in range(len(cost)):
        probability, later = known[at(block, PROBABILITY, lane)], known[at(block, LATER, lane)]
        values[lane] = cost[lane] * probability
        fixed[lane] = cost[lane] * (_ONE - probability) * later * later_share


@inner
def _value(known: Any, blocks: int, first: int, end: int, table: Any, later_share: float) -> None:
    """VALUE and FIXED of a layer."""
    _find_later(known, blocks)
    for block in range(blocks):
        begin, stop = first + block * LANES, min(first + (block + 1) * LANES, end)
        _value_block(
            known, block, table[COST, begin:stop], table[VALUE, begin:stop], table[FIXED, begin:stop], later_share
        )


@inner
def _list_rows(layers: Any, layer: int, experts_of: Any) -> Any:
    """Rows of the layer's links: the experts that this pass used in its sources."""
    own, most = layers[layer], (layers.shape[1] - COLUMNS) // 4
    first, place, count = COLUMNS + most, 0, 0
    for source in own[SOURCE : SOURCE + own[SOURCES]]:
        for index in range(layers[source, USED]):
            own[first + count] = place + layers[source, COLUMNS + index]
            count += 1
        place += experts_of[source + 1] - experts_of[source]
    own[SPOKE] = count
    return own[first : first + count]


@inner
def _rows_that_spoke(layers: Any, layer: int) -> Any:
    first = COLUMNS + (layers.shape[1] - COLUMNS) // 4
    return layers[layer, first : first + layers[layer, SPOKE]]


@inner
def known_of(known: Any, layers: Any, layer: int, experts: int) -> Any:
    """What is known of a layer: its blocks, and how many they are."""
    first, blocks = layers[layer, FIRST_BLOCK], (experts + LANES - 1) // LANES
    return known[first * _BLOCK : (first + blocks) * _BLOCK], blocks


@entry(
    "void(int64[::1], float64[::1], float64[:, ::1], float64[:, ::1], int64[::1], float32[::1], float64[:, ::1], "
    "float32[::1], int64[:, ::1], float64[::1], float64[::1], float32[::1])"
)
def visit_layer(
    visit: Any, shares: Any, table: Any, per_layer: Any, first_keys: Any, known: Any, weights: Any, links: Any,
    layers: Any, scales: Any, rates: Any, spare: Any,
) -> None:  # fmt: skip
    """A layer was routed: learn from it, note it, predict its next visit, and value its experts.

    Args:
        visit: see `visit_kernel`.
        shares: see `visit_kernel`.
        table: see `selection_kernel`; VALUE, FIXED and USED_AT are filled.
        per_layer: float64 [rows, layers], see `selection_kernel`; SCALE is filled.
        first_keys: int64 [layers + 1].
        known: float32, all layers', see above; updated.
        weights: float64 [layers, INPUTS]; updated.
        links: float32, all layers' links, each [sources' experts, experts]: what each source's use in this pass adds
            to the log-odds; rows that spoke are updated.
        layers: int64 [layers, COLUMNS + n], see above; updated.
        scales: float64 [2 x layers]: a layer's scale is its place here, counted from the layer that was visited last.
        rates: float64 [RATES].
        spare: float32 [SPARE_LINES x the experts of the largest layer's blocks]; overwritten.
    """
    layer, first, end = visit[LAYER], visit[FIRST], visit[END]
    decode, used = len(shares) == 0, keys_of(visit)
    note_use(visit, table)
    experts = end - first
    here, blocks = known_of(known, layers, layer, experts)
    need, line = _spare_lines(spare, blocks)
    need[:] = _ZERO
    for index in range(len(used)):
        need[used[index] - first] = _ONE if decode else np.float32(shares[index])
    own, lines = weights[layer], links[layers[layer, LINKS] :]
    if decode:
        _find_errors(here, blocks, experts, need, line)
        _learn(here, blocks, own, lines, _rows_that_spoke(layers, layer), line, experts, rates)
    # A prefill's last token would be a source, but nobody tells of one token.
    layers[layer, USED] = len(used) if decode else 0
    for index in range(layers[layer, USED]):
        layers[layer, COLUMNS + index] = used[index] - first
    long, middle, short = np.float32(rates[LONG]), np.float32(rates[MIDDLE]), np.float32(rates[SHORT])
    _decay_and_add(here, blocks, need, long, middle, short)
    _note_last(here, blocks, need, _ONE if decode else _ZERO)
    _predict(here, blocks, own, lines, _list_rows(layers, layer, first_keys), line, experts)
    _value(here, blocks, first, end, table, rates[LATER_SHARE])
    count = per_layer.shape[1]
    for other in range(count):
        per_layer[SCALE, other] = scales[count - 1 - layer + other]


@entry("void(int64, float64[::1], float64[:, ::1], int64[::1], float32[::1], int64[:, ::1], float64[::1])")
def value_foretold(
    layer: int, probabilities: Any, table: Any, first_keys: Any, known: Any, layers: Any, rates: Any
) -> None:
    """Value a layer's experts by what a predictor says of its next visit.

    Args:
        layer: which.
        probabilities: float64 [experts of the layer].
        table: see `selection_kernel`; VALUE and FIXED are filled.
        first_keys: int64 [layers + 1].
        known: see `visit_layer`.
        layers: see `visit_layer`.
        rates: see `visit_layer`.
    """
    first = first_keys[layer]
    here, _ = known_of(known, layers, layer, len(probabilities))
    for expert in range(len(probabilities)):
        cost, probability = table[COST, first + expert], probabilities[expert]
        table[VALUE, first + expert] = cost * probability
        later = here[at(expert // LANES, LATER, expert % LANES)]
        table[FIXED, first + expert] = cost * (1.0 - probability) * later * rates[LATER_SHARE]
