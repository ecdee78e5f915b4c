"""Seconds of a call on a machine that is shared: repeated until they stand still, or told that they do not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

STABLE_SPREAD = 0.05
_STILL_FASTER = 0.9
_MOST_BLOCKS = 8
_FEWEST = 3
_MOST = 200


@dataclass(frozen=True)
class Timing:
    """A call's time.

    Attributes:
        seconds: lower quartile of the repeats: others on the machine can only take time away.
        spread: of the lower half of the repeats, as a share of it.
        repeats: how many there were.
    """

    seconds: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, repeats: Sequence[float]) -> Timing:
        """From the seconds of at least one repeat."""
        ordered = sorted(repeats)
        return cls(ordered[(len(ordered) - 1) // 4], _spread(ordered), len(ordered))

    @property
    def stable(self) -> bool:
        """Whether it can be relied on."""
        return self.spread <= 2 * STABLE_SPREAD


def repeated(
    call: Callable[[], object], *, budget_s: float, fewest: int = _FEWEST, clock: Callable[[], float] = perf_counter
) -> list[float]:
    """Seconds of a call, repeated until the lower half lies within STABLE_SPREAD, or the budget is spent.

    Args:
        call: what is timed; called once before, so that it is compiled and its memory is there.
        budget_s: seconds for all repeats; the fewest are made whatever they take.
        fewest: repeats at least.
        clock: seconds.
    """
    call()
    found: list[float] = []
    start = clock()
    while len(found) < _MOST:
        before = clock()
        call()
        found.append(clock() - before)
        if len(found) >= fewest and (
            clock() - start >= budget_s or (len(found) >= 2 * fewest and _spread(sorted(found)) <= STABLE_SPREAD)
        ):
            break
    return found


def settle(block: Callable[[], Sequence[float]]) -> int:
    """Call until calls no longer become faster than before: kernels are compiled, plans made and memory taken.

    Args:
        block: makes some calls, of every shape that is to be timed, and returns their seconds.

    Returns:
        how often it was called: twice at least, a fixed number of times at most.
    """
    before = statistics.median(block())
    for blocks in range(2, _MOST_BLOCKS + 1):
        last = statistics.median(block())
        if last >= _STILL_FASTER * before:
            return blocks
        before = last
    return _MOST_BLOCKS


def _spread(ordered: list[float]) -> float:
    """Of the lower half, as a share of the lower quartile."""
    low, middle = ordered[0], ordered[(len(ordered) - 1) // 2]
    return (middle - low) / max(ordered[(len(ordered) - 1) // 4], 1e-12)
