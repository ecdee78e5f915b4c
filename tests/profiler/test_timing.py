"""Repeats end when a time stands still or the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from profiler.timing import Timing, repeated, settle


class Clock:
    """Time that passes only in calls."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now = 0.0
        self.calls = 0
        self._seconds = seconds

    def call(self) -> None:
        self.calls += 1
        self.now += next(self._seconds)

    def __call__(self) -> float:
        return self.now


def measure(call: Callable[[], None], budget_s: float, clock: Clock) -> Timing:
    return Timing.of(repeated(call, budget_s=budget_s, clock=clock))


def endless(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


def test_a_steady_call_is_timed_a_few_times() -> None:
    clock = Clock(endless(0.5))
    found = measure(clock.call, budget_s=100, clock=clock)
    assert (found.seconds, found.spread, found.stable) == (0.5, 0.0, True)
    assert found.repeats == 6
    assert clock.calls == 7, "the first one warms up and does not count"


def test_the_first_call_does_not_count() -> None:
    clock = Clock(iter([100.0, *[1.0] * 50]))
    assert measure(clock.call, budget_s=100, clock=clock).seconds == 1.0


def test_the_budget_ends_what_does_not_stand_still() -> None:
    clock = Clock(endless(1.0, 3.0, 2.0, 4.0))
    found = measure(clock.call, budget_s=30, clock=clock)
    assert 10 <= found.repeats <= 16
    assert not found.stable
    assert found.spread > 0.3


def test_a_slow_call_is_repeated_all_the_same() -> None:
    clock = Clock(endless(50.0))
    assert measure(clock.call, budget_s=1, clock=clock).repeats == 3


def test_what_others_take_away_does_not_count() -> None:
    clock = Clock(endless(1.0, 1.0, 9.0, 1.0))
    found = measure(clock.call, budget_s=1000, clock=clock)
    assert (found.seconds, found.stable) == (1.0, True)


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_there_is_an_end(budget: float) -> None:
    clock = Clock(endless(1.0, 10.0))
    assert measure(clock.call, budget_s=budget, clock=clock).repeats <= 200


def _blocks(*medians: float) -> Iterator[list[float]]:
    """Blocks of calls, one of which others slowed down."""
    return ([100 * median, median, 0.5 * median] for median in medians)


@pytest.mark.parametrize(
    ("medians", "calls"),
    [
        ((9.0, 1.0, 1.0), 3), ((1.0, 1.0), 2), ((9.0, 5.0, 2.0, 1.95), 4), ((1.0, 3.0), 2),
        (tuple(2.0**-number for number in range(30)), 8),
    ],
)  # fmt: skip
def test_calls_settle_when_they_get_no_faster(medians: tuple[float, ...], calls: int) -> None:
    assert settle(_blocks(*medians).__next__) == calls
