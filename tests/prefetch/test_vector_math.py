"""Logarithms and sigmoids in vectors, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from prefetch.vector_math_kernel import log_into, sigmoid_into

log_of = njit("void(float32[::1], float32[::1])", error_model="numpy")(lambda x, out: log_into(x, out))
sigmoid_of = njit("void(float32[::1], float32[::1])", error_model="numpy")(lambda x, out: sigmoid_into(x, out))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_logarithm(count: int) -> None:
    x = np.exp(np.random.default_rng(count).uniform(-80, 80, count)).astype(np.float32)
    x[: count // 8] = np.linspace(0.5, 2.0, count // 8)
    out = np.full(count, np.nan, np.float32)
    log_of(x, out)
    np.testing.assert_allclose(out, np.log(x.astype(np.float64)), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_sigmoid(count: int) -> None:
    x = np.random.default_rng(count).uniform(-20, 20, count).astype(np.float32)
    x[: count // 8] = np.float32(0)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    sigmoid_of(x, x)
    np.testing.assert_allclose(x, expected, rtol=3e-6)
    ends = np.array([-1e30, -200, 200, 1e30], np.float32)
    sigmoid_of(ends, ends)
    assert ends.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-30)
