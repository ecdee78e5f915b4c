"""Whether prefetching pays: measured, not believed."""

from __future__ import annotations

from statistics import median


class Controller:
    """Compares passes with and without, by turns, and keeps what takes less time; tries the other again now and then.

    A trial is `rounds` epochs of each way, in turns; the way with the lower median epoch wins. `margin` is in favour of
    off: what does not help costs power and wear. The winner runs for `kept` passes, then there is a new trial.
    """

    def __init__(self, *, epoch: int = 8, rounds: int = 3, kept: int = 512, margin: float = 0.01) -> None:
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
        if min(map(len, self._epochs.values())) < self.rounds:
            self.on = not self.on
            return
        self.on = self.seconds(on=True) < (1.0 - self.margin) * self.seconds(on=False)
        self.trials += 1
        self.trying = False
        self._passes = 0

    def seconds(self, *, on: bool) -> float:
        """Seconds of a pass one way, as the last or running trial found; NaN before its first epoch."""
        found = self._epochs[on]
        return median(found) if found else float("nan")
