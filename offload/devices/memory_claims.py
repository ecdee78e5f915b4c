"""What each model may take of a device: together they bound what torch's allocator takes, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


class MemoryClaims:
    """The claims on one device's memory. While there are any, torch takes no more than all of them together."""

    def __init__(self, limit: Callable[[int | None], None]) -> None:
        """Begin without claims.

        Args:
            limit: bounds what torch takes, in bytes; None for no bound.
        """
        self._limit = limit
        self._nbytes: dict[MemoryClaim, int] = {}
        self._lock = threading.Lock()

    def claim(self, nbytes: int) -> MemoryClaim:
        """Let torch take so many bytes for the owner of what is returned, until it is released."""
        made = MemoryClaim(self)
        with self._lock:
            self._limit(sum(self._nbytes.values()) + nbytes)
            self._nbytes[made] = nbytes
        return made

    def release(self, claim: MemoryClaim) -> None:
        """Claims that are released already are none."""
        with self._lock:
            if self._nbytes.pop(claim, None) is not None:
                self._limit(sum(self._nbytes.values()) if self._nbytes else None)


class MemoryClaim:
    """One owner's."""

    def __init__(self, claims: MemoryClaims) -> None:
        self._claims = claims

    def release(self) -> None:
        """Give it back; may be called again."""
        self._claims.release(self)
