"""Whether prefetching pays: measured, not believed."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt
from statistics import fmean, median, stdev

_SURE = 2.0
"""A trial ends once its ratio is so many standard errors away from what decides."""

_FEWEST = 4
"""Pairs from which a standard error can be told."""


class Controller:
    """Compares passes with and without, by turns, and keeps what takes less time; tries the other again now and then.

    A trial is pairs of neighbouring epochs, one each way, whose order alternates (on, off, off, on, ...). What decides
    is the mean logarithm of the pairs' ratios without the highest and the lowest quarter. A machine that others use too
    is faster now and slower then by more than there is to gain: neighbours meet the same moment, and odd pairs do not
    count. After `rounds` pairs the trial goes on until it is sure, to at most `most_rounds`; whichever leads runs for
    `between` passes before each further pair. `margin` is in favour of off: what does not help costs power and wear.
    The winner runs for `kept` passes, then there is a new trial.
    """

    def __init__(
        self,
        *,
        epoch: int = 4,
        rounds: int = 11,
        most_rounds: int = 44,
        between: int = 24,
        kept: int = 1024,
        margin: float = 0.01,
    ) -> None:
        """Start with a trial.

        Args:
            epoch: passes of one way before the other has its turn; the first of each is not counted, as it finds what
                the other way left.
            rounds: epochs of each way in a trial, at least.
            most_rounds: and at most, no fewer.
            between: passes between pairs from then on.
            kept: passes until the next trial.
            margin: share by which passes must be quicker with than without.
        """
        if epoch < 2 or rounds < 1 or kept < 1 or most_rounds < rounds:
            raise ValueError(
                f"epoch={epoch}, rounds={rounds}, most_rounds={most_rounds}, kept={kept}: expected at least 2, 1, "
                "rounds and 1"
            )
        self.epoch, self.rounds, self.most_rounds, self.kept, self.margin = epoch, rounds, most_rounds, kept, margin
        self.between = between
        self.trials = 0
        self.on = True
        self._begin()

    def _begin(self) -> None:
        self.trying = True
        self._passes = self._resting = 0
        self._current: list[float] = []
        self._epochs: dict[bool, list[float]] = {True: [], False: []}

    def note_pass(self, seconds: float) -> None:
        """A decoded token took so long; may switch `on`."""
        self._passes += 1
        if not self.trying:
            if self._passes >= self.kept:
                self._begin()
            return
        if self._resting:
            self._resting -= 1
            if not self._resting and len(self._epochs[True]) % 2:
                self.on = not self.on
            return
        self._current.append(seconds)
        if len(self._current) < self.epoch:
            return
        self._epochs[self.on].append(sum(self._current[1:]) / (self.epoch - 1))
        self._current = []
        with_it, without = self._epochs[True], self._epochs[False]
        if len(with_it) != len(without):
            self.on = not self.on
        elif len(with_it) >= self.rounds:
            self._decide([log(max(on, 1e-9) / max(off, 1e-9)) for on, off in zip(with_it, without, strict=True)])

    def _decide(self, ratios: Sequence[float]) -> None:
        """Let the better one run; end the trial if it is sure, or long enough."""
        middle, error = _middle(ratios)
        lead = log(1.0 - self.margin) - middle
        self.on = lead > 0
        if len(ratios) == self.most_rounds or (len(ratios) >= _FEWEST and abs(lead) > _SURE * error):
            self.trials += 1
            self.trying = False
            self._passes = 0
        else:
            self._resting = self.between

    def seconds(self, *, on: bool) -> float:
        """Median seconds of a pass one way, as the last or running trial found; NaN before its first epoch."""
        found = self._epochs[on]
        return median(found) if found else float("nan")


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the middle half, and its standard error by the winsorised deviation (Tukey and McLaughlin, 1963)."""
    ordered = sorted(values)
    count, cut = len(ordered), (len(ordered) + 1) // 4
    kept = ordered[cut : count - cut]
    if count < _FEWEST:
        return fmean(kept), float("inf")
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    return fmean(kept), stdev(winsorised) * sqrt(count) / len(kept)
