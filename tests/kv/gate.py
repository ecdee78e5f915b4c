"""A gate that a test opens by degrees, for what other threads do."""

from __future__ import annotations

import threading

PATIENCE_S = 60


class Gate:
    """Who passes waits until the schedule lets as many go."""

    def __init__(self) -> None:
        self._allowed = 0
        self._opened = False
        self._changed = threading.Condition()

    def pass_one(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._opened or self._allowed > 0, PATIENCE_S), "never let go"
            self._allowed -= 1

    def let_go(self, count: int) -> None:
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._opened = True
            self._changed.notify_all()
