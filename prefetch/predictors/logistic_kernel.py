# mypy: allow-untyped-calls
"""Logistic regression on choices of k among n, learnt online by Newton's method."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner

_STEPS = 6
_CLOSE = 0.01
"""Newton's steps end when the sum is off by such a share of k; one or two are enough once weights are learnt."""

_MOST_SHIFT = 2.0


@inner
def choose(log_odds: Any, k: int) -> None:
    """Turn log-odds of n things, of which k will be chosen, into probabilities whose sum is k to within 1%.

    All log-odds are shifted alike, by Newton's method. Whoever learns from these probabilities need not learn how many
    are chosen, only which.

    Args:
        log_odds: float64 [n], filled with probabilities.
        k: how many are chosen.
    """
    count = len(log_odds)
    if k >= count:
        log_odds[:] = 1.0
        return
    for place in range(count):
        log_odds[place] = np.exp(-log_odds[place])  # odds against
    scale = 1.0
    for _ in range(_STEPS):
        total, slope = 0.0, 1e-6
        for place in range(count):
            share = 1.0 / (1.0 + scale * log_odds[place])
            total += share
            slope += share * (1.0 - share)
        if abs(total - k) < _CLOSE * k:
            break
        scale *= np.exp(-min(max((k - total) / slope, -_MOST_SHIFT), _MOST_SHIFT))
    for place in range(count):
        log_odds[place] = 1.0 / (1.0 + scale * log_odds[place])


@inner
def learn(inputs: Any, probabilities: Any, chosen: Any, decay: float, curvature: Any, weights: Any) -> None:
    """One step of online Newton on the log loss (Hazan, Agarwal and Kale, Machine Learning 69, 2007), decayed.

    Args:
        inputs: float64 [n, m], what was known of each.
        probabilities: float64 [n], that were said.
        chosen: float64 [n], 1 for what was chosen, 0 for the rest.
        decay: of what earlier steps say of the curvature; what it forgets, later steps may change again.
        curvature: float64 [m, m], positive definite, the decayed sum of the loss's second derivatives; updated.
        weights: float64 [m], updated.
    """
    size = len(weights)
    step = np.zeros(size)
    for row in range(size):
        for column in range(row + 1):
            curvature[row, column] *= decay
    for place in range(len(chosen)):
        share, known = probabilities[place], inputs[place]
        error, slope = chosen[place] - share, share * (1.0 - share)
        for row in range(size):
            step[row] += error * known[row]
            for column in range(row + 1):
                curvature[row, column] += slope * known[row] * known[column]
    _solve(curvature, step)
    for row in range(size):
        weights[row] += step[row]


@inner
def _solve(lower: Any, right: Any) -> None:
    """Solve in place, by Cholesky, for a symmetric matrix of which the lower half counts; it stays as it is."""
    size = len(right)
    root = np.zeros((size, size))
    for row in range(size):
        for column in range(row + 1):
            rest = lower[row, column]
            for place in range(column):
                rest -= root[row, place] * root[column, place]
            # An input that never spoke leaves its start's curvature, which decays, not less than this.
            root[row, column] = np.sqrt(max(rest, 1e-3)) if row == column else rest / root[column, column]
    for row in range(size):
        for place in range(row):
            right[row] -= root[row, place] * right[place]
        right[row] /= root[row, row]
    for row in range(size - 1, -1, -1):
        for place in range(row + 1, size):
            right[row] -= root[place, row] * right[place]
        right[row] /= root[row, row]
