"""Curves go through their points, never fall, and come back from measurements that lie on one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.curves import Sample, SmallProducts, TokenCurve, fit_curve, roofline

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


def test_speeds_that_were_measured_between_go_over_into_each_other() -> None:
    curve = TokenCurve(1e-5, (1, 3, 8, 16, 32, 128), (1e-10, 1.1e-10, 1.2e-10, 2e-10, 4e-10, 16e-10))
    assert curve.with_speeds(1.0, 1.0, 1.0) == curve
    found = curve.with_speeds(2.0, 1.25, 1.5)
    speeds = [before / after for before, after in zip(curve.weight_s, found.weight_s, strict=True)]
    # 3 is at 0.528 of the way from 1 to 8 in logarithms, 16 half-way from 8 to 32.
    assert speeds == pytest.approx([2.0, 2.0 - 0.528 * 0.5, 1.5, 1.375, 1.25, 1.25], rel=1e-3)
    # That one token was slow when the profile was measured says nothing of eight.
    assert curve.with_speeds(2.0, 1.0, 1.0).weight_s[2:] == curve.weight_s[2:]


def test_measurements_on_a_curve_give_the_curve() -> None:
    samples = [
        Sample(weights, tokens, CURVE.seconds(weights, tokens)) for weights in (10**5, 10**7) for tokens in (1, 4, 16)
    ]
    found = fit_curve(samples)
    assert found.call_s == pytest.approx(CURVE.call_s)
    assert found.tokens == CURVE.tokens
    assert found.weight_s == pytest.approx(CURVE.weight_s)


def test_what_entries_take_is_told_apart_from_weights() -> None:
    """Half as wide a layer takes more than a quarter, and a slower processor takes longer for its entries too."""
    curve = TokenCurve(2e-5, (1, 8, 64), (1e-10, 2e-10, 9e-10), 1e-9)
    samples = [
        Sample(rows * 2048, tokens, curve.seconds(rows * 2048, tokens, 1, rows + 2048), rows + 2048)
        for rows, tokens in ((2048, 1), (2048, 8), (2048, 64), (256, 1), (256, 64))
    ]
    found = fit_curve(samples)
    assert found.entry_s == pytest.approx(1e-9, rel=0.02)
    for side, tokens in ((1024, 64), (1024, 20), (256, 8)):
        expected = curve.seconds(side**2, tokens, 2, 2 * side)
        assert found.seconds(side**2, tokens, 2, 2 * side) == pytest.approx(expected, rel=0.01)
    assert found.seconds(1024**2, 64, 1, 2048) > 1.02 * found.seconds(2048**2, 64, 1, 4096) / 4
    assert found.with_speeds(1.0, 0.5).entry_s == pytest.approx(2 * found.entry_s)


def test_what_each_expert_takes_is_told_apart_from_weights() -> None:
    curve = TokenCurve(2e-5, (1, 8, 32), (1e-10, 2e-10, 9e-10), 1e-10, 6e-6)

    def sample(count: int, side: int, tokens: int) -> Sample:
        weights, entries = count * 3 * side**2, count * 4 * side
        return Sample(weights, tokens, curve.seconds(weights, tokens, 1, entries, count), entries, count)

    sizes = ((8, 1024, 1), (8, 1024, 8), (2, 1024, 32), (1, 1024, 1), (8, 256, 1), (8, 256, 32))
    found = fit_curve([sample(*size) for size in sizes])
    assert (found.call_s, found.item_s) == pytest.approx((2e-5, 6e-6), rel=0.1)
    for size in ((14, 512, 1), (4, 768, 1), (3, 400, 8)):
        expected = sample(*size)
        told = found.seconds(expected.weights, expected.tokens, 1, expected.entries, expected.items)
        assert told == pytest.approx(expected.seconds, rel=0.02)
    assert found.with_speeds(2.0, 0.5).item_s == pytest.approx(2 * found.item_s)


def test_large_products_may_differ_by_tokens() -> None:
    curve = TokenCurve(2e-4, (1, 16, 512), (1e-11, 5e-11, 2e-9))
    samples = [
        Sample(weights, tokens, curve.seconds(weights, tokens)) for weights, tokens in ((10**7, 16), (10**6, 512))
    ]
    samples += [Sample(weights, 1, curve.seconds(weights, 1)) for weights in (10**5, 10**8)]
    found = fit_curve(samples)
    assert found.call_s == pytest.approx(curve.call_s)
    assert found.weight_s == pytest.approx(curve.weight_s)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8), st.floats(1e-6, 1.0))
def test_noise_still_gives_a_curve(seconds: list[float], small: float) -> None:
    samples = [Sample(1000, 2**i, value, 70) for i, value in enumerate(seconds)]
    found = fit_curve([*samples, Sample(10, 1, small, 20), Sample(10, 2 ** (len(seconds) - 1), small, 20)])
    assert found.call_s <= min(seconds) / 2
    assert all(a <= b for a, b in itertools.pairwise(found.weight_s))
    # Pooling keeps the sum: no measurement is dropped.
    entries = sum(70 * 2**i * found.entry_s for i in range(len(seconds)))
    assert sum(found.weight_s) * 1000 + len(seconds) * found.call_s + entries == pytest.approx(sum(seconds))


@pytest.mark.parametrize("samples", [[], [Sample(10, 1, 1.0), Sample(10, 1, 2.0)]])
def test_no_curve_without_measurements(samples: list[Sample]) -> None:
    with pytest.raises(ValueError):
        fit_curve(samples)


def test_products_with_few_weights_have_speeds_of_their_own() -> None:
    small = SmallProducts(1e5, 1e7, 0.5, 2.0)
    curve = TokenCurve(1e-5, (1, 64), (1e-10, 4e-10), 1e-9, 1e-6)
    found = curve.with_speeds(1.0, 1.0, 1.0, small)
    for tokens, speed in ((1, 0.5), (32, 2.0), (64, 2.0)):
        for weights, share in ((1e4, 1.0), (1e5, 1.0), (1e6, 0.5), (1e7, 0.0), (1e8, 0.0)):
            expected = curve.without_call_s(weights, tokens, 1e3) / speed**share
            assert found.without_call_s(weights, tokens, 1e3) == pytest.approx(expected)
            # Of several experts and calls, which have so many weights each.
            assert found.seconds(6 * weights, tokens, 2, 3e3, 3) == pytest.approx(2e-5 + 6 * expected)
    assert found.seconds(2e5, 1, 2) == pytest.approx(2e-5 + 2e5 * 1e-10 / 0.5), "linear layers are not experts"
    assert small.speed(1e5, 32**0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong", [(1e7, 1e5, 1.0, 1.0), (0.0, 9.0, 1.0, 1.0), (1.0, 2.0, 0.0, 1.0), (1.0, 2.0, 1.0, -1.0)]
)
def test_small_products_are_small(wrong: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="small products"):
        SmallProducts(*wrong)
