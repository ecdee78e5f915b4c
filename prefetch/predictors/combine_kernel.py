# mypy: allow-untyped-calls
"""Several predictors' words on one layer, combined by logistic regression that learns from what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner

# What is known of each expert of a layer to come.
BIAS, ROUTER, TRANSITION, PREVIOUS, POPULAR, INPUTS = range(6)

# Rows of the counts that `score` adds to: correct among the k most probable, by predictor, those among the 2 k most
# probable of all together, and k in all.
BY_ROUTER, BY_TRANSITION, BY_PREVIOUS, COMBINED, COMBINED_TWICE, ROWS = range(6)

_FLOOR = 0.01


@inner
def _log_odds(share: float) -> Any:
    kept = min(max(share, _FLOOR), 1.0 - _FLOOR)
    return np.log(kept / (1.0 - kept))


@entry(
    "void(float64[::1], float32[:, ::1], int64[::1], float64[::1], float64[::1], int64, float64[::1], "
    "float64[:, ::1], float64[::1])"
)
def predict(
    logits: Any,
    transitions: Any,
    active: Any,
    previous: Any,
    popular: Any,
    top_k: int,
    weights: Any,
    inputs: Any,
    probabilities: Any,
) -> None:
    """How probably each expert of a layer to come is needed.

    Args:
        logits: float64 [experts], what the layer's router says of an earlier layer's hidden state.
        transitions: float32 [experts of the earlier layer, experts], decayed shares of tokens at which the first led
            to the second.
        active: int64 [n], experts of the earlier layer that the token goes to.
        previous: float64 [experts], 1 where the token before needed it.
        popular: float64 [experts], decayed share of tokens that needed it.
        top_k: experts of a token.
        weights: float64 [INPUTS].
        inputs: float64 [experts, INPUTS], filled: kept for `learn`.
        probabilities: float64 [experts], filled.
    """
    experts = len(logits)
    spread = max(np.std(logits), 1e-6)
    # Half way between the last expert that would be picked and the first that would not.
    ordered = np.sort(logits)
    edge = ordered[experts - top_k]
    if top_k < experts:
        edge = 0.5 * (edge + ordered[experts - top_k - 1])
    for expert in range(experts):
        follows = 0.0
        for one in active:
            follows += transitions[one, expert]
        inputs[expert, BIAS] = 1.0
        inputs[expert, ROUTER] = min(max((logits[expert] - edge) / spread, -4.0), 4.0)
        inputs[expert, TRANSITION] = _log_odds(follows / max(len(active), 1))
        inputs[expert, PREVIOUS] = previous[expert]
        inputs[expert, POPULAR] = _log_odds(popular[expert])
        logit = 0.0
        for place in range(INPUTS):
            logit += weights[place] * inputs[expert, place]
        probabilities[expert] = 1.0 / (1.0 + np.exp(-logit))


@inner
def _correct(values: Any, used: Any, k: int) -> Any:
    order = np.argsort(-values)
    return np.sum(used[order[:k]])


@entry("void(float64[:, ::1], float64[::1], float64[::1], float64, float64[::1])")
def learn(inputs: Any, probabilities: Any, used: Any, rate: float, weights: Any) -> None:
    """The layer came: one step of gradient descent on the log loss.

    Args:
        inputs: float64 [experts, INPUTS] of the prediction.
        probabilities: float64 [experts], the prediction.
        used: float64 [experts], 1 where needed.
        rate: of learning.
        weights: float64 [INPUTS]; updated.
    """
    step = np.zeros(INPUTS)
    for expert in range(len(used)):
        error = used[expert] - probabilities[expert]
        for place in range(INPUTS):
            step[place] += error * inputs[expert, place]
    for place in range(INPUTS):
        weights[place] += rate * step[place] / len(used)


@entry("void(float64[:, ::1], float64[::1], float64[::1], float64[::1])")
def score(inputs: Any, probabilities: Any, used: Any, counts: Any) -> None:
    """Count what was right.

    Args:
        inputs: float64 [experts, INPUTS] of the prediction.
        probabilities: float64 [experts], the prediction.
        used: float64 [experts], 1 where needed.
        counts: float64 [ROWS + 1]; added to. k is the number of experts that were needed.
    """
    k = int(np.sum(used))
    counts[BY_ROUTER] += _correct(inputs[:, ROUTER], used, k)
    counts[BY_TRANSITION] += _correct(inputs[:, TRANSITION], used, k)
    counts[BY_PREVIOUS] += _correct(inputs[:, PREVIOUS] + 0.01 * inputs[:, POPULAR], used, k)
    counts[COMBINED] += _correct(probabilities, used, k)
    counts[COMBINED_TWICE] += _correct(probabilities, used, min(2 * k, len(used)))
    counts[ROWS] += k


@entry("void(float32[:, ::1], int64[::1], float64[::1], float64)")
def note_transition(transitions: Any, active: Any, used: Any, decay: float) -> None:
    """transitions[one] moves towards `used` (float64 [experts]) for each expert `one` of `active` (int64)."""
    for one in active:
        for expert in range(len(used)):
            transitions[one, expert] = decay * transitions[one, expert] + (1.0 - decay) * used[expert]
