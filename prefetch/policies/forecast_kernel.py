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

_SHARE_FLOOR = 0.01
_FLOOR_LOG_ODDS = float(np.log(_SHARE_FLOOR / (1.0 - _SHARE_FLOOR)))
_LOG_SINCE = np.log(1.0 + np.arange(256.0))


@inner
def _log_odds(share: float) -> Any:
    if share <= _SHARE_FLOOR:
        # What nearly all experts of a large layer come down to.
        return _FLOOR_LOG_ODDS
    kept = min(share, 1.0 - _SHARE_FLOOR)
    return np.log(kept / (1.0 - kept))


@entry(
    "void(float64[:, ::1], float64[:, ::1], float64[::1], float64[::1], int64[::1], float64[::1], int64, float64[::1])"
)
def visit(
    features: Any, inputs: Any, weights: Any, probabilities: Any, used: Any, shares: Any, first: int, rates: Any
) -> None:
    """A layer was routed: learn from what was predicted, then predict its next visit.

    Args:
        features: float64 [experts, FEATURES] as of the last visit; updated.
        inputs: float64 [experts, INPUTS], what the last prediction was made from; updated.
        weights: float64 [INPUTS]; updated at decode by one step of gradient descent on the log loss.
        probabilities: float64 [experts], those of this visit; replaced by those of the next.
        used: int64 [n], keys that are needed.
        shares: float64 [n], their shares of tokens at prefill; empty at decode. A prefill shows what is popular, not
            what is recent.
        first: key of the layer's expert 0.
        rates: float64 [4]: decay of LONG, MIDDLE and SHORT for one visit, and the learning rate.
    """
    experts = len(probabilities)
    decode = len(shares) == 0
    need = np.zeros(experts)
    for index in range(len(used)):
        need[used[index] - first] = 1.0 if decode else shares[index]
    if decode:
        step = np.zeros(INPUTS)
        for expert in range(experts):
            error = need[expert] - probabilities[expert]
            for place in range(INPUTS):
                step[place] += error * inputs[expert, place]
        for place in range(INPUTS):
            weights[place] += rates[3] * step[place] / experts
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
        logit = 0.0
        for place in range(INPUTS):
            logit += weights[place] * inputs[expert, place]
        probabilities[expert] = min(max(1.0 / (1.0 + np.exp(-logit)), LEAST), MOST)
