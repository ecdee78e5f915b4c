"""A modelled link: copies within host memory that take as long as a link to an accelerator would.

The clock is the real one. What overlaps in a step (CPU kernels, disk reads, copies) is timed by running it; a virtual
clock for the link alone would have to be told when each of them starts and ends, and would then measure that model and
not the runtime. So a copy is made, and then its thread sleeps until the moment at which the link would be done. Tests
give a clock of their own and wait for nothing.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from offload.errors import InvalidArgumentError
from offload.sizes import parse_size

CHUNK_NBYTES = 2 << 20
"""Copies are cut into pieces of this size: an urgent one waits for at most one piece of another."""


@dataclass(frozen=True)
class Link:
    """How fast bytes get to an accelerator.

    Attributes:
        bytes_per_s: bandwidth.
        latency_s: of each piece that is copied.
    """

    bytes_per_s: float
    latency_s: float = 10e-6

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise ValueError(f"a link of {self.bytes_per_s} bytes/s and {self.latency_s} s carries nothing")

    def copy_s(self, nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> float:
        """Seconds of a copy that has the link for itself."""
        return nbytes / self.bytes_per_s + -(-nbytes // chunk_nbytes) * self.latency_s


_RATE = re.compile(r"\s*(?P<size>[^/]+)/\s*s\s*")


def parse_link(value: str | Link) -> Link:
    """A link such as "25GB/s".

    Raises:
        InvalidArgumentError: not a rate.
    """
    if isinstance(value, Link):
        return value
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidArgumentError(f'link={value!r}: expected bytes per second such as "25GB/s"')
    return Link(float(parse_size(match["size"], "link")))


class Clock(ABC):
    """Time as a link sees it."""

    @abstractmethod
    def now_s(self) -> float:
        """Seconds since some moment."""

    @abstractmethod
    def sleep_until(self, moment_s: float) -> None:
        """Return at `moment_s` or later."""


class RealClock(Clock):
    """The system's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since the system started."""
        return time.monotonic()

    def sleep_until(self, moment_s: float) -> None:
        """Sleep; returns at once where the moment has passed."""
        left = moment_s - time.monotonic()
        if left > 0:
            time.sleep(left)


class LinkReader:
    """What a `ReadEngine` reads from when it fills slots over a link: host memory, by address.

    One piece crosses the link at a time. `offset` of a request is the address of the bundle, whose memory the caller
    keeps valid until the ticket is finished.

    Attributes:
        paths: names the source in messages.
        bytes_read: bytes that crossed.
        retries, direct: as of `ShardReader`; nothing is retried here.
    """

    def __init__(self, link: Link, clock: Clock | None = None) -> None:
        self.paths = (Path("host memory"),)
        self.bytes_read = 0
        self.retries = 0
        self.direct = True
        self._link = link
        self._clock = RealClock() if clock is None else clock
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        """Copy len(out) bytes from the address `offset`; returns when the link would be done."""
        del shard
        with self._lock:
            begin_s = max(self._clock.now_s(), self._free_at_s)
            source = (ctypes.c_char * len(out)).from_address(offset)
            out[:] = memoryview(source).cast("B")
            self.bytes_read += len(out)
            self._free_at_s = begin_s + self._link.copy_s(len(out), len(out))
            self._clock.sleep_until(self._free_at_s)

    def close(self) -> None:
        """Nothing is held."""

    def renew_lock(self) -> None:
        """In a forked child: the parent's threads hold no lock here."""
        self._lock = threading.Lock()
