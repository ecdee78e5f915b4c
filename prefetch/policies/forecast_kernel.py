# mypy: allow-untyped-calls
"""Learning how probably each expert of a layer is needed next, online, by logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner, inner_unordered
from prefetch.policies.selection_kernel import COST, FIXED, SCALE, VALUE
from prefetch.policies.visit_kernel import END, FIRST, LAYER, VISIT_KEYS, note_use
from prefetch.vector_math_kernel import log_into, sigmoid_into

# Rows of what is known of each expert, float32 [ROWS, keys]. LONG, MIDDLE and SHORT are shares of visits that needed
# it, decayed; SINCE is visits since the last decoded use. The next five are what the regression gets of it: log-odds of
# the shares, LAST, whether the last decoded token needed it, and log(1 + SINCE). Then what it says, and LATER: mean
# 1 / (passes until it is needed + PATIENCE_PASSES) if the next visit does not need it, for the share of LONG that do.
LONG, MIDDLE, SHORT, SINCE, LONG_ODDS, MIDDLE_ODDS, SHORT_ODDS, LAST, LOG_SINCE, PROBABILITY, LATER, ROWS = range(12)

_FIRST_INPUT = LONG_ODDS
BIAS, INPUTS = 5, 6
"""Inputs: the five, and 1."""

# Columns of what is known of a layer, int64 [layers, COLUMNS + 4 x the experts of the largest]: where its links start,
# how many sources it has, which, how many experts the last decoded token used, and how many rows of links spoke last.
# The used experts and the rows follow.
LINKS, SOURCES, SOURCE, USED, SPOKE, COLUMNS = 0, 1, 2, 5, 6, 7

# Rates: decays of LONG, MIDDLE and SHORT for one visit, learning rates of weights and of links, and what LATER counts.
WEIGHT_RATE, LINK_RATE, LATER_SHARE, RATES = 3, 4, 5, 6

_LEAST, _MOST = np.float32(1e-3), np.float32(1.0 - 1e-3)
"""Nothing is certain."""

MOST_ROWS = 32.0
"""So many used sources speak in full; of more, each speaks less."""

_FLOOR, _CEILING = np.float32(0.01), np.float32(0.99)
"""Of shares whose odds are taken."""

_ONE = np.float32(1)

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


@inner_unordered
def _decay_and_add(row: Any, need: Any, decay: float) -> None:
    kept, new = np.float32(decay), np.float32(1.0 - decay)
    for expert in range(len(need)):
        row[expert] = kept * row[expert] + new * need[expert]


@inner_unordered
def _odds_into(shares: Any, out: Any) -> None:
    """Log-odds of shares, float32."""
    odds = np.empty(len(shares), np.float32)
    for expert in range(len(shares)):
        kept = min(max(shares[expert], _FLOOR), _CEILING)
        odds[expert] = kept / (_ONE - kept)
    log_into(odds, out)


@inner_unordered
def _add_row(total: Any, row: Any, times: Any) -> None:
    for expert in range(len(total)):
        total[expert] += times * row[expert]


@inner_unordered
def _sum_product(one: Any, other: Any) -> Any:
    total = np.float32(0)
    for expert in range(len(one)):
        total += one[expert] * other[expert]
    return total


@inner_unordered
def _sum_of(one: Any) -> Any:
    total = np.float32(0)
    for expert in range(len(one)):
        total += one[expert]
    return total


@inner
def _voice(rows: Any) -> Any:
    """Several sequences' experts speak together as loudly as one's."""
    return min(1.0, MOST_ROWS / max(len(rows), 1))


@inner
def _learn(known: Any, span: Any, weights: Any, links: Any, rows: Any, need: Any, rates: Any) -> None:
    """The layer's next visit came: one step of gradient descent on the log loss of what was predicted."""
    error = need - known[PROBABILITY][span]
    pace = rates[WEIGHT_RATE] / len(need)
    for place in range(BIAS):
        weights[place] += pace * _sum_product(error, known[_FIRST_INPUT + place][span])
    weights[BIAS] += pace * _sum_of(error)
    for row in rows:
        _add_row(links[row], error, np.float32(rates[LINK_RATE] * _voice(rows)))


@inner
def _observe(known: Any, span: Any, need: Any, decode: bool, rates: Any) -> None:
    """Note a visit. A prefill shows what is popular, not what is recent."""
    for feature in (LONG, MIDDLE, SHORT):
        _decay_and_add(known[feature][span], need, rates[feature])
        _odds_into(known[feature][span], known[_FIRST_INPUT + feature][span])
    since = known[SINCE][span]
    if decode:
        for expert in range(len(need)):
            since[expert] = np.float32(0) if need[expert] > 0 else since[expert] + _ONE
        known[LAST][span] = need
    log_into(since + _ONE, known[LOG_SINCE][span])


@inner_unordered
def _bound(probabilities: Any) -> None:
    for expert in range(len(probabilities)):
        probabilities[expert] = min(max(probabilities[expert], _LEAST), _MOST)


@inner
def _predict(known: Any, span: Any, weights: Any, links: Any, rows: Any) -> None:
    """How probably the layer's next visit needs each expert, and what later ones are worth."""
    probabilities, later, long = known[PROBABILITY][span], known[LATER][span], known[LONG][span]
    logits = np.full(len(later), np.float32(weights[BIAS]))
    for place in range(BIAS):
        _add_row(logits, known[_FIRST_INPUT + place][span], np.float32(weights[place]))
    for row in rows:
        _add_row(logits, links[row], np.float32(_voice(rows)))
    sigmoid_into(logits, probabilities)
    _bound(probabilities)
    for expert in range(len(later)):
        place = long[expert] * _STEPS_FLOAT
        below = np.int32(place)
        later[expert] = _LATER[below] + (place - np.float32(below)) * (_LATER[below + 1] - _LATER[below])


@inner_unordered
def _value(table: Any, span: Any, probabilities: Any, later: Any, later_share: float) -> None:
    """VALUE and FIXED of a layer."""
    values, fixed, cost = table[VALUE][span], table[FIXED][span], table[COST][span]
    for expert in range(len(values)):
        values[expert] = cost[expert] * probabilities[expert]
        fixed[expert] = cost[expert] * (_ONE - probabilities[expert]) * later[expert] * later_share


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
def _links_of(links: Any, layers: Any, layer: int, first_keys: Any) -> Any:
    """float32 [sources' experts, experts]: what each source's use in this pass adds to the log-odds."""
    experts, rows = first_keys[layer + 1] - first_keys[layer], 0
    for source in layers[layer, SOURCE : SOURCE + layers[layer, SOURCES]]:
        rows += first_keys[source + 1] - first_keys[source]
    start = layers[layer, LINKS]
    return links[start : start + rows * experts].reshape(rows, experts)


@entry(
    "void(int64[::1], float64[::1], float64[:, ::1], float64[:, ::1], int64[::1], float32[:, ::1], float64[:, ::1], "
    "float32[::1], int64[:, ::1], float64[::1], float64[::1])"
)
def visit_layer(
    visit: Any, shares: Any, table: Any, per_layer: Any, first_keys: Any, known: Any, weights: Any, links: Any,
    layers: Any, scales: Any, rates: Any,
) -> None:  # fmt: skip
    """A layer was routed: learn from it, note it, predict its next visit, and value its experts.

    Args:
        visit: see `visit_kernel`.
        shares: see `visit_kernel`.
        table: see `selection_kernel`; VALUE, FIXED and USED_AT are filled.
        per_layer: float64 [rows, layers], see `selection_kernel`; SCALE is filled.
        first_keys: int64 [layers + 1].
        known: float32 [ROWS, keys], see above; updated.
        weights: float64 [layers, INPUTS]; updated.
        links: float32, all layers' links, see `_links_of`; rows that spoke are updated.
        layers: int64 [layers, COLUMNS + n], see above; updated.
        scales: float64 [2 x layers]: a layer's scale is its place here, counted from the layer that was visited last.
        rates: float64 [RATES].
    """
    layer, first, end = visit[LAYER], visit[FIRST], visit[END]
    decode = len(shares) == 0
    note_use(visit, table)
    need = np.zeros(end - first, np.float32)
    for index in range(len(visit) - VISIT_KEYS):
        need[visit[VISIT_KEYS + index] - first] = _ONE if decode else np.float32(shares[index])
    span, lines = slice(first, end), _links_of(links, layers, layer, first_keys)
    if decode:
        _learn(known, span, weights[layer], lines, _rows_that_spoke(layers, layer), need, rates)
    # A prefill's last token would be a source, but nobody tells of one token.
    layers[layer, USED] = len(visit) - VISIT_KEYS if decode else 0
    for index in range(layers[layer, USED]):
        layers[layer, COLUMNS + index] = visit[VISIT_KEYS + index] - first
    _observe(known, span, need, decode, rates)
    _predict(known, span, weights[layer], lines, _list_rows(layers, layer, first_keys))
    _value(table, span, known[PROBABILITY][span], known[LATER][span], rates[LATER_SHARE])
    count = per_layer.shape[1]
    for other in range(count):
        per_layer[SCALE, other] = scales[count - 1 - layer + other]
