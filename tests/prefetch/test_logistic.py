"""Probabilities of choices of k among n, and what they learn, against numpy and bisection."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from prefetch.predictors import logistic_kernel as kernel


@njit("void(float64[::1], int64)", error_model="numpy")
def choose(log_odds, k):  # type: ignore[no-untyped-def]
    kernel.choose(log_odds, k)


@njit("void(float64[:, ::1], float64[::1], float64[::1], float64, float64[:, ::1], float64[::1])", error_model="numpy")
def learn(inputs, probabilities, chosen, decay, curvature, weights):  # type: ignore[no-untyped-def]
    kernel.learn(inputs, probabilities, chosen, decay, curvature, weights)


def expected_shares(log_odds: np.ndarray, k: int) -> np.ndarray:
    """Shifted alike until they add up to k, by bisection."""
    low, high = -60.0, 60.0
    for _ in range(200):
        shift = 0.5 * (low + high)
        shares = 1.0 / (1.0 + np.exp(-(log_odds + shift)))
        low, high = (low, shift) if shares.sum() > k else (shift, high)
    return shares


@pytest.mark.parametrize(("count", "k"), [(8, 2), (64, 4), (256, 8), (5, 4), (3, 1)])
def test_probabilities_add_up_to_what_is_chosen(count: int, k: int) -> None:
    chance = np.random.default_rng(count)
    for _ in range(50):
        # As sharp as routers are, and off by as much as a regression that has not learnt yet.
        log_odds = 3.0 * chance.standard_normal(count) - np.log(count / k - 1.0) + chance.uniform(-1.0, 1.0)
        found = log_odds.copy()
        choose(found, k)
        assert ((found > 0) & (found < 1)).all()
        assert (np.argsort(found) == np.argsort(log_odds)).all()
        assert found.sum() == pytest.approx(k, rel=0.01)
        assert found == pytest.approx(expected_shares(log_odds, k), abs=0.03)


def test_all_are_chosen_where_there_are_no_more() -> None:
    for k in (3, 7):
        found = np.array([-5.0, 0.0, 1.0])
        choose(found, k)
        assert found.tolist() == [1.0, 1.0, 1.0]


def test_far_off_log_odds_stay_probabilities() -> None:
    found = np.array([-700.0, -600.0, 500.0, 700.0])
    choose(found, 1)
    assert np.isfinite(found).all() and ((found >= 0) & (found <= 1)).all()


def test_a_step_is_newtons() -> None:
    chance = np.random.default_rng(7)
    weights, curvature = chance.standard_normal(5), 3.0 * np.eye(5)
    wanted_weights, wanted = weights.copy(), curvature.copy()
    for _ in range(20):
        inputs = chance.standard_normal((12, 5))
        shares = 1.0 / (1.0 + np.exp(-inputs @ wanted_weights))
        chosen = (chance.random(12) < 0.3).astype(float)
        learn(inputs, shares, chosen, 0.99, curvature, weights)
        wanted = 0.99 * wanted + (inputs * (shares * (1 - shares))[:, None]).T @ inputs
        wanted_weights = wanted_weights + np.linalg.solve(wanted, inputs.T @ (chosen - shares))
        assert weights == pytest.approx(wanted_weights, rel=1e-9)
        # Only the lower half is kept.
        assert np.tril(curvature) == pytest.approx(np.tril(wanted), rel=1e-9)


def test_an_input_that_never_speaks_moves_nothing() -> None:
    weights, curvature = np.array([1.0, 2.0]), 3.0 * np.eye(2)
    for _ in range(5000):
        inputs = np.array([[1.0, 0.0], [-1.0, 0.0]])
        learn(inputs, 1.0 / (1.0 + np.exp(-inputs @ weights)), np.array([1.0, 0.0]), 0.995, curvature, weights)
    assert weights[1] == 2.0
    assert np.isfinite(weights).all() and np.isfinite(curvature).all()
