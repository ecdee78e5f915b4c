"""The compiled queue without threads: a seeded chance decides who goes on, between the steps of a compiled reader."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cpu_kernels import read_queue_kernel as kernel
from cpu_kernels.jit import entry
from offload.errors import StorageError
from offload.tiers.direct_engine import DirectEngine
from offload.tiers.disk import ShardReader
from tests.tiers.readers import Bytes, MemoryReader
from tests.tiers.turns import Turns

_list_in_turn, _begin, _read = kernel.list_in_turn, kernel.begin, kernel.read
_note_read, _is_right, _leave = kernel.note_read, kernel.is_right, kernel.leave
_hand_over, _take_unchecked = kernel.hand_over, kernel.take_unchecked


@entry("int64(int64)")
def list_in_turn(state: int) -> Any:
    return _list_in_turn(state)


@entry("UniTuple(int64, 2)(int64, int64)")
def begin(state: int, urgency: int) -> Any:
    return _begin(state, urgency)


@entry("boolean(int64, int64, int64)")
def read(state: int, address: int, chunk: int) -> Any:
    return _read(state, address, chunk)


@entry("boolean(int64, int64, int64, boolean)")
def note_read(state: int, address: int, urgency: int, arrived: bool) -> Any:
    return _note_read(state, address, urgency, arrived)


@entry("boolean(int64, int64)")
def hand_over(state: int, address: int) -> Any:
    return _hand_over(state, address)


@entry("int64(int64)")
def take_unchecked(state: int) -> Any:
    return _take_unchecked(state)


@entry("boolean(int64)")
def is_right(address: int) -> Any:
    return _is_right(address)


@entry("int64(int64, int64, boolean)")
def leave(state: int, address: int, right: bool) -> Any:
    return _leave(state, address, right)


class FileReader(MemoryReader):
    """The same bytes in memory and behind a descriptor; where there is none, reads are Python's.

    Attributes:
        elsewhere: what others count of these shards.
    """

    def __init__(self, shard: Bytes) -> None:
        super().__init__(shard)
        self.fd = os.memfd_create("shard")
        os.pwrite(self.fd, shard.tobytes(), 0)
        self.elsewhere: list[npt.NDArray[np.int64]] = []

    def direct_fd(self, shard: int) -> int:
        assert shard == 0
        return self.fd if self.direct else -1

    def also_reads(self, count: npt.NDArray[np.int64]) -> None:
        self.elsewhere.append(count)

    def close(self) -> None:
        super().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class _Running:
    """A reader thread that is not one: what it does next, and with what."""

    address: int
    chunk: int
    urgency: int
    next: str = "read"
    arrived: bool = False
    right: bool = True


class ScheduledDirectEngine(Turns, DirectEngine):
    """See `Turns`.

    Attributes:
        served: (offset of the ticket, chunk), in the order in which chunks were begun.
        handed_over: bundles that another thread checked than the one that read them.
    """

    def __init__(self, reader: FileReader, *, threads: int, chunk_nbytes: int, chance: random.Random) -> None:
        super().__init__(cast(ShardReader, reader), threads=threads, chunk_nbytes=chunk_nbytes)
        self.chance = chance
        self.served: list[tuple[int, int]] = []
        self.handed_over = 0
        self._running: list[_Running] = []
        self._threads = threads + 1

    def turn(self) -> bool:
        state = self._queue.address
        free = len(self._running) < self._threads
        reads = free and list_in_turn(state) >= 0
        checks = free and bool(self._queue.words[kernel.UNCHECKED])
        choices = len(self._running) + reads + checks
        if not choices:
            return False
        self.turns += 1
        chosen = self.chance.randrange(choices)
        if chosen >= len(self._running) and checks and (not reads or chosen > len(self._running)):
            self._running.append(_Running(take_unchecked(state), 0, 1, next="check"))
            self.handed_over += 1
        elif chosen >= len(self._running):
            urgency = list_in_turn(state)
            address, chunk = begin(state, urgency)
            self.served.append((self._queue._kept[address].request.offset, chunk))
            self._running.append(_Running(address, chunk, urgency))
        elif not self._go_on(self._running[chosen]):
            self._running.pop(chosen)
        return True

    def _go_on(self, one: _Running) -> bool:
        state = self._queue.address
        if one.next == "read":
            one.arrived = self._arrives(one)
            one.next = "note"
        elif one.next == "note":
            one.next = "hand over" if note_read(state, one.address, one.urgency, one.arrived) else "leave"
        elif one.next == "hand over":
            if hand_over(state, one.address):
                return False
            one.next = "check"
        elif one.next == "check":
            one.right = bool(is_right(one.address))
            one.next = "leave"
        elif one.next == "leave":
            one.next = "python"
            return bool(leave(state, one.address, one.right))
        else:
            self._queue.go_on_with(one.address)
            return False
        return True

    def _arrives(self, one: _Running) -> bool:
        """A compiled read, in the weather that the test makes for the reader."""
        reader, request = cast(FileReader, self.reader), self._queue._kept[one.address].request
        start = one.chunk * int(self._queue.words[kernel.CHUNK_NBYTES])
        part = request.out[start : start + int(self._queue.words[kernel.CHUNK_NBYTES])]
        try:
            reader.before_read(request.offset + start, len(part))
        except StorageError:
            return False
        arrived = bool(read(self._queue.address, one.address, one.chunk))
        if arrived:
            reader.after_read(request.offset + start, cast(memoryview, part))
        return arrived

    def cancel_all(self) -> None:
        self._queue.cancel_all()
        while self._queue.unfinished:
            assert self.turn(), "cancelled reads never end"
