"""Stand-ins for `ShardReader`: shards in memory, with reads that fail, or that wait until the test lets them go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import xxhash

from offload.tiers.disk import ShardReader
from offload.tiers.transfer import ReadRequest

PATIENCE_S = 60
"""A wait that takes longer has hung."""

Bytes = npt.NDArray[np.uint8]


def random_bytes(nbytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@dataclass(eq=False)
class Call:
    """One read that waits."""

    offset: int
    nbytes: int
    released: bool = False
    error: BaseException | None = None


class MemoryReader:
    """Reads from arrays.

    Attributes:
        calls: all reads so far, as (offset, nbytes).
        before_read: called first in every read; what it raises, the read raises.
        after_read: called with the read's memory once it is filled.
    """

    def __init__(self, shard: Bytes) -> None:
        self.shard = shard
        self.paths = (Path("/store/shard-0"),)
        self.direct = True
        self.bytes_read = 0
        self.retries = 0
        self.calls: list[tuple[int, int]] = []
        self.before_read: Callable[[int, int], None] = lambda offset, nbytes: None
        self.after_read: Callable[[int, memoryview], None] = lambda offset, out: None
        self.reading = 0
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        assert shard == 0
        with self.lock:
            assert not self.closed.is_set(), "a closed shard was read"
            self.calls.append((offset, len(out)))
            self.reading += 1
        try:
            self.before_read(offset, len(out))
            out[:] = self.shard[offset : offset + len(out)].data
            self.after_read(offset, out)
        finally:
            with self.lock:
                self.reading -= 1

    def close(self) -> None:
        with self.lock:
            assert self.reading == 0, "a shard was closed while it was read"
        self.closed.set()

    def renew_lock(self) -> None:
        self.lock = threading.Lock()

    def as_shard_reader(self) -> ShardReader:
        return cast(ShardReader, self)

    def request(self, offset: int, out: Bytes, *, wrong_checksum: bool = False) -> ReadRequest:
        """A read of the bytes at `offset` into `out`."""
        checksum = xxhash.xxh3_64_intdigest(self.shard[offset : offset + out.size])
        return ReadRequest(0, offset, memoryview(out), checksum ^ wrong_checksum, f"expert at {offset}")  # type: ignore[arg-type]


@dataclass
class Gate:
    """Holds reads until they are let go, in the order that the test wants."""

    waiting: list[Call] = field(default_factory=list)
    opened: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, offset: int, nbytes: int) -> None:
        call = Call(offset, nbytes)
        with self.changed:
            if not self.opened:
                self.waiting.append(call)
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: call.released or self.opened, PATIENCE_S), "never let go"
        if call.error is not None:
            raise call.error

    def wait_for(self, count: int) -> list[Call]:
        """Return when `count` reads wait."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.waiting) >= count, PATIENCE_S), "reads did not come"
            return list(self.waiting)

    def let_go(self, call: Call, error: BaseException | None = None) -> None:
        with self.changed:
            self.waiting.remove(call)
            call.error = error
            call.released = True
            self.changed.notify_all()

    def open(self) -> None:
        with self.changed:
            self.opened = True
            self.waiting.clear()
            self.changed.notify_all()
