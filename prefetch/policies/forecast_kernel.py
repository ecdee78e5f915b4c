# mypy: allow-untyped-calls
"""Learning how probably each expert of a layer is needed next, online, by logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner

# What was seen of an expert up to the layer's last visit. LONG, MIDDLE and SHORT are shares of visits that needed it,
# decayed; SINCE is visits since the last decoded use.
LONG, MIDDLE, SHORT, LAST, SINCE, FEATURES = range(6)

# What the regression gets of it: log-odds of the shares, LAST, and log(1 + SINCE).
BIAS, INPUTS = FEATURES, FEATURES + 1

LEAST, MOST = 1e-3, 1.0 - 1e-3
"""Nothing is certain."""

MOST_ROWS = 32.0
"""So many used sources speak in full; of more, each speaks less."""

_SHARE_FLOOR = 0.01
_FLOOR_LOG_ODDS = float(np.log(_SHARE_FLOOR / (1.0 - _SHARE_FLOOR)))
_LOG_SINCE = np.log(1.0 + np.arange(256.0))

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


_LATER = _later_table()


@inner
def _log_odds(share: float) -> Any:
    if share <= _SHARE_FLOOR:
        # What nearly all experts of a large layer come down to.
        return _FLOOR_LOG_ODDS
    kept = min(share, 1.0 - _SHARE_FLOOR)
    return np.log(kept / (1.0 - kept))


@inner
def _add_links(logits: Any, links: Any, rows: Any, share: float) -> None:
    """Logits += share x sum of the links' rows."""
    total = np.zeros(len(logits), np.float32)
    for row in rows:
        line = links[row]
        for expert in range(len(total)):
            total[expert] += line[expert]
    for expert in range(len(total)):
        logits[expert] += share * total[expert]


@inner
def _share(rows: Any) -> Any:
    """Several sequences' experts speak together as loudly as one's."""
    return min(1.0, MOST_ROWS / max(len(rows), 1))


@entry("void(float64[:, ::1], float64[::1], float32[:, ::1], int64[::1], float64[::1], float64[::1], float64[::1])")
def learn(inputs: Any, weights: Any, links: Any, rows: Any, probabilities: Any, need: Any, rates: Any) -> None:
    """The layer's next visit came: one step of gradient descent on the log loss of what was predicted.

    Args:
        inputs: float64 [experts, INPUTS], what the prediction was made from.
        weights: float64 [INPUTS]; updated.
        links: float32 [sources, experts]; the rows that spoke are updated.
        rows: int64 [n], those rows.
        probabilities: float64 [experts], the prediction.
        need: float64 [experts], 1 where needed.
        rates: float64 [5], see `predict`.
    """
    experts = len(need)
    step = np.zeros(INPUTS)
    paced = np.empty(experts, np.float32)
    pace = rates[4] * _share(rows)
    for expert in range(experts):
        error = need[expert] - probabilities[expert]
        paced[expert] = pace * error
        for place in range(INPUTS):
            step[place] += error * inputs[expert, place]
    for place in range(INPUTS):
        weights[place] += rates[3] * step[place] / experts
    for row in rows:
        line = links[row]
        for expert in range(experts):
            line[expert] += paced[expert]


@entry(
    "void(float64[:, ::1], float64[:, ::1], float64[::1], float32[:, ::1], int64[::1], float64[::1], float64[::1], "
    "float64[::1], boolean, float64[::1])"
)
def predict(
    features: Any, inputs: Any, weights: Any, links: Any, rows: Any, probabilities: Any, later: Any, need: Any,
    decode: bool, rates: Any,
) -> None:  # fmt: skip
    """A layer was routed: note it, and predict its next visit.

    Args:
        features: float64 [experts, FEATURES] as of the last visit; updated.
        inputs: float64 [experts, INPUTS], filled.
        weights: float64 [INPUTS].
        links: float32 [sources, experts], what each source's use in this pass adds to the log-odds.
        rows: int64 [n], the sources that were used.
        probabilities: float64 [experts], filled.
        later: float64 [experts], filled: mean 1 / (passes until an expert is needed + PATIENCE_PASSES) if the next
            visit does not need it, for the share of LONG visits that do.
        need: float64 [experts], 1 where needed, or the share of a prefill's tokens.
        decode: whether it was no prefill. A prefill shows what is popular, not what is recent.
        rates: float64 [5]: decay of LONG, MIDDLE and SHORT for one visit, learning rate of weights, and of links.
    """
    experts = len(need)
    logits = np.zeros(experts)
    _add_links(logits, links, rows, _share(rows))
    for expert in range(experts):
        for feature in (LONG, MIDDLE, SHORT):
            decay = rates[feature]
            share = decay * features[expert, feature] + (1.0 - decay) * need[expert]
            features[expert, feature] = share
            inputs[expert, feature] = _log_odds(share)
        if decode:
            features[expert, LAST] = need[expert]
            features[expert, SINCE] = 0.0 if need[expert] > 0 else features[expert, SINCE] + 1.0
        inputs[expert, LAST] = features[expert, LAST]
        inputs[expert, SINCE] = _LOG_SINCE[min(int(features[expert, SINCE]), 255)]
        logit = logits[expert]
        for place in range(INPUTS):
            logit += weights[place] * inputs[expert, place]
        probabilities[expert] = min(max(1.0 / (1.0 + np.exp(-logit)), LEAST), MOST)
        place = features[expert, LONG] * _STEPS
        below = int(place)
        later[expert] = _LATER[below] + (place - below) * (_LATER[below + 1] - _LATER[below])
