"""Whether prefetching pays: measured, not believed."""

from __future__ import annotations

from statistics import median


class Controller:
    """Compares passes with and without, by turns, and keeps what takes less time; tries the other again now and then.

    A trial is `rounds` pairs of neighbouring epochs, one each way, whose order alternates; the median of the pairs'
    ratios decides. A machine that others use too is faster now and slower then by more than there is to gain:
    neighbours meet the same moment, and an odd pair does not count. `margin` is in favour of off: what does not help
    costs power and wear. The winner runs for `kept` passes, then there is a new trial.
    """

    def __init__(self, *, epoch: int = 4, rounds: int = 11, kept: int = 1024, margin: float = 0.01) -> None:
        """Start with a trial.

        Args:
            epoch: passes of one way before the other has its turn; the first of each is not counted, as it finds what
                the other way left.
            rounds: epochs of each way in a trial.
            kept: passes until the next trial.
            margin: share by which passes must be quicker with than without.
        """
        if epoch < 2 or rounds < 1 or kept < 1:
            raise ValueError(f"epoch={epoch}, rounds={rounds}, kept={kept}: expected at least 2, 1 and 1")
        self.epoch, self.rounds, self.kept, self.margin = epoch, rounds, kept, margin
        self.trials = 0
        self.on = True
        self._begin()

    def _begin(self) -> None:
        self.trying = True
        self._passes = 0
        self._current: list[float] = []
        self._epochs: dict[bool, list[float]] = {True: [], False: []}

    def note_pass(self, seconds: float) -> None:
        """A decoded token took so long; may switch `on`."""
        self._passes += 1
        if not self.trying:
            if self._passes >= self.kept:
                self._begin()
            return
        self._current.append(seconds)
        if len(self._current) < self.epoch:
            return
        self._epochs[self.on].append(sum(self._current[1:]) / (self.epoch - 1))
        self._current = []
        with_it, without = self._epochs[True], self._epochs[False]
        if len(with_it) != len(without):
            self.on = not self.on
        elif len(with_it) == self.rounds:
            ratio = median(on / max(off, 1e-9) for on, off in zip(with_it, without, strict=True))
            self.on = ratio < 1.0 - self.margin
            self.trials += 1
            self.trying = False
            self._passes = 0

    def seconds(self, *, on: bool) -> float:
        """Median seconds of a pass one way, as the last or running trial found; NaN before its first epoch."""
        found = self._epochs[on]
        return median(found) if found else float("nan")
