"""Logarithms and sigmoids in vectors, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from prefetch import vector_math_kernel as kernel


@njit("void(float32[::1], float32[::1])", error_model="numpy")
def log_into(x, out):  # type: ignore[no-untyped-def]
    for place in range(len(x)):
        out[place] = kernel.log_of(x[place])


@njit("void(float32[::1], float32[::1])", error_model="numpy")
def sigmoid_into(x, out):  # type: ignore[no-untyped-def]
    for place in range(len(x)):
        out[place] = kernel.sigmoid_of(x[place])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_logarithm(count: int) -> None:
    x = np.exp(np.random.default_rng(count).uniform(-80, 80, count)).astype(np.float32)
    x[: count // 8] = np.linspace(0.5, 2.0, count // 8)
    out = np.full(count, np.nan, np.float32)
    log_into(x, out)
    np.testing.assert_allclose(out, np.log(x.astype(np.float64)), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_sigmoid(count: int) -> None:
    x = np.random.default_rng(count).uniform(-20, 20, count).astype(np.float32)
    x[: count // 8] = np.float32(0)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    sigmoid_into(x, x)
    np.testing.assert_allclose(x, expected, rtol=3e-6)
    ends = np.array([-1e30, -200, 200, 1e30], np.float32)
    sigmoid_into(ends, ends)
    assert ends.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-30)
