"""Turns of a run whose speed is predicted."""

from __future__ import annotations

import pytest

from benchmarks.accuracy_run import _prompts
from benchmarks.sessions import Fed


@pytest.mark.parametrize(
    ("speeds", "expected"), [((100.0,), 100.0), ((400.0, 250.0, 100.0), 3 / (1 / 400 + 1 / 250 + 1 / 100))]
)
def test_short_prompts_are_repeated_until_a_turn_is_long(speeds: tuple[float, ...], expected: float) -> None:
    """Of 100 tokens; what follows the last would end the test."""
    turns = iter([Fed(speed, 2.0 * number, None, 0.1 * number) for number, speed in enumerate(speeds)])
    found = _prompts(lambda: next(turns), 100)
    assert found.tokens_per_s == pytest.approx(expected)
    last = len(speeds) - 1
    assert (found.disk_nbytes, found.hit_rate, found.others) == pytest.approx((last, 0.0, 0.05 * last))
    assert next(turns, None) is None
