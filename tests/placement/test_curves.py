"""Curves go through their points, never fall, and come back from measurements that lie on one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.curves import TokenCurve, fit_curve, roofline

CURVE = TokenCurve(1e-5, (1, 4, 16), (1e-10, 2e-10, 8e-10))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0.5, 1e-10), (1, 1e-10), (2.5, 1.5e-10), (4, 2e-10), (10, 5e-10), (16, 8e-10), (32, 16e-10)],
)
def test_between_and_beyond_points(tokens: float, expected: float) -> None:
    assert CURVE.seconds_per_weight(tokens) == pytest.approx(expected)
    assert CURVE.seconds(1000, tokens, calls=3) == pytest.approx(3e-5 + 1000 * expected)


@given(st.floats(0.1, 1000), st.floats(0, 1000))
def test_more_tokens_never_cost_less(tokens: float, more: float) -> None:
    assert CURVE.seconds_per_weight(tokens) <= CURVE.seconds_per_weight(tokens + more) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("call", "tokens", "seconds"),
    [
        (0.0, (), ()),
        (0.0, (1,), (1.0, 2.0)),
        (-1.0, (1,), (1.0,)),
        (0.0, (2, 1), (1.0, 1.0)),
        (0.0, (1, 2), (2.0, 1.0)),
        (0.0, (1,), (0.0,)),
        (0.0, (0, 1), (1.0, 1.0)),
    ],
)
def test_what_is_no_curve_is_refused(call: float, tokens: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        TokenCurve(call, tokens, seconds)


def test_a_roofline_is_the_larger_of_reading_and_multiplying() -> None:
    curve = roofline(bits=4, bytes_per_s=1e10, flops_per_s=1e12, call_s=0.0)
    # 0.05 ns to read a weight, 0.002 ns for each token: as long at 25 tokens.
    assert curve.seconds_per_weight(16) == pytest.approx(0.05e-9)
    assert curve.seconds_per_weight(128) == pytest.approx(0.256e-9)
    assert curve.seconds_per_weight(10_000) == pytest.approx(20e-9)


def test_faster_memory_helps_what_waits_for_it() -> None:
    curve = TokenCurve(1e-5, (1, 2, 4, 8), (1e-10, 1e-10, 1.5e-10, 4e-10))
    assert curve.with_speeds(1.0, 1.0) == curve
    found = curve.with_speeds(2.0, 1.0)
    assert (found.call_s, found.tokens) == (1e-5, curve.tokens)
    assert found.weight_s == pytest.approx((0.5e-10, 0.5e-10, 1.125e-10, 4e-10))
    slow = curve.with_speeds(0.1, 1.0)
    assert slow.weight_s[0] == pytest.approx(10e-10)
    assert slow.weight_s[3] == pytest.approx(10e-10), "no less than fewer tokens"


def test_faster_arithmetic_helps_the_rest() -> None:
    found = TokenCurve(1e-5, (1, 8), (1e-10, 4e-10)).with_speeds(1.0, 2.0)
    assert found.call_s == pytest.approx(0.5e-5)
    assert found.weight_s == pytest.approx((1e-10, 2e-10))


def test_measurements_on_a_curve_give_the_curve() -> None:
    samples = [(weights, tokens, CURVE.seconds(weights, tokens)) for weights in (10**5, 10**7) for tokens in (1, 4, 16)]
    found = fit_curve(samples)
    assert found.call_s == pytest.approx(CURVE.call_s)
    assert found.tokens == CURVE.tokens
    assert found.weight_s == pytest.approx(CURVE.weight_s)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8), st.floats(1e-6, 1.0))
def test_noise_still_gives_a_curve(seconds: list[float], small: float) -> None:
    samples = [(1000, 2**i, value) for i, value in enumerate(seconds)]
    found = fit_curve([*samples, (10, 1, small)])
    assert found.call_s <= min(seconds) / 2
    assert all(a <= b for a, b in itertools.pairwise(found.weight_s))
    # Pooling keeps the sum: no measurement is dropped.
    assert sum(found.weight_s) * 1000 + len(seconds) * found.call_s == pytest.approx(sum(seconds))


@pytest.mark.parametrize("samples", [[], [(10, 1, 1.0), (10, 1, 2.0)]])
def test_no_curve_without_measurements(samples: list[tuple[int, int, float]]) -> None:
    with pytest.raises(ValueError):
        fit_curve(samples)
