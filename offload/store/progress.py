"""How long work on a store reports itself."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What shows progress. `advance` may come from any thread, `start` and `finish` from the one that does the work.

    Each `start` is followed by exactly one `finish`, also when the work fails.
    """

    def start(self, total_bytes: int, description: str) -> None:
        """Begin; `total_bytes` is 0 where the amount of work is not known, as while waiting for a lock."""
        ...

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are done; over one task they add up to `total_bytes`."""
        ...

    def finish(self) -> None:
        """End of the task, done or failed."""
        ...


class NoProgress:
    """Shows nothing."""

    def start(self, total_bytes: int, description: str) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
