"""The queue of reads, and what a reader thread does with it."""

from __future__ import annotations

import _thread
import heapq
import itertools
import threading
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash

from offload.errors import StoreCorruptError

if TYPE_CHECKING:
    from offload.devices.base import Span


class Urgency(Enum):
    """How soon a read is needed; a lower value is served first."""

    NOW = 0
    SOON = 1


class Reader(Protocol):
    """What an engine reads from, with any number of threads: `ShardReader` from disk, `LinkReader` from host memory.

    Attributes:
        direct: False where a page cache is in between.
        bytes_read: bytes that arrived.
        retries: reads that were repeated.
    """

    direct: bool
    bytes_read: int
    retries: int

    @property
    def paths(self) -> Sequence[Path]:
        """Names of the shards, for messages."""
        ...

    def read(self, shard: int, offset: int, out: Any) -> None:
        """Fill `out`, a `Span` of the device that the reader is made for, from a shard."""
        ...

    def close(self) -> None:
        """No read follows."""
        ...

    def renew_lock(self) -> None:
        """In a forked child, before any other call."""
        ...


class ReadRequest(NamedTuple):
    """One bundle to read.

    Attributes:
        shard: index of the store's shard.
        offset: bytes from the shard's start.
        out: where it goes, writable, as long as the bundle, on whatever device.
        checksum: xxh3-64 of the bundle, or of each of as many equal parts; None where the host cannot read what
            arrived.
        label: names the expert in messages.
        fix: what to do about bytes that are wrong.
    """

    shard: int
    offset: int
    out: Span
    checksum: int | tuple[int, ...] | None
    label: str
    fix: str = "remove the store with `offload store rm` and load again"

    def wrong_part(self, arrived: memoryview) -> tuple[int, int, int] | None:
        """Where the first part that is not what it should be starts, its checksum and the right one."""
        expected = self.checksum if isinstance(self.checksum, tuple) else (self.checksum,)
        step = len(arrived) // len(expected)
        for index, right in enumerate(expected):
            found = xxhash.xxh3_64_intdigest(arrived[index * step : (index + 1) * step])
            if right is not None and found != right:
                return index * step, found, right
        return None


class Ticket:
    """The completion of one read. Written under the engine's lock, read by anyone."""

    __slots__ = ("_chunks", "cancelled", "error", "finished", "in_flight", "request", "unclaimed", "unread", "urgency")

    def __init__(self, request: ReadRequest, chunks: int, urgency: Urgency) -> None:
        self.request = request
        self.urgency = urgency
        self._chunks = chunks
        self.unclaimed = set(range(chunks))
        self.unread = chunks
        self.in_flight = 0
        self.finished = False
        self.cancelled = False
        self.error: BaseException | None = None

    @property
    def begun(self) -> bool:
        """True when a thread has begun to read a part of it, or was kept from that."""
        return len(self.unclaimed) < self._chunks

    @property
    def succeeded(self) -> bool:
        """True when the bundle is there, whole and checked."""
        return self.finished and self.error is None and not self.cancelled


class ReadQueue:
    """What reader threads share; holds no reference to the engine, so that an engine can be collected."""

    def __init__(self, reader: Reader, chunk_nbytes: int, most_reading: int, most_soon: int | None = None) -> None:
        self.reader = reader
        self.chunk_nbytes = chunk_nbytes
        self.most_reading = most_reading
        self.most_soon = most_soon
        self.heap: list[tuple[int, int, Ticket, int]] = []
        self.sequence = itertools.count()
        self.unfinished: set[Ticket] = set()
        self.threads: list[threading.Thread] = []
        self.reading = 0
        self.reading_soon = 0
        self.reading_s = 0.0
        self._reading_since = 0.0
        self.busy = 0
        self.held = False
        self.closed = False
        self.renew_locks()

    def renew_locks(self) -> None:
        """New ones: nobody holds them or waits."""
        # Taken by `with lock`, never `with condition`: an interrupt can leave a condition's lock taken.
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.done = threading.Condition(self.lock)

    def push(self, ticket: Ticket) -> None:
        """With the lock: queue what is not being read yet, as urgent as the ticket is."""
        for chunk in sorted(ticket.unclaimed):
            heapq.heappush(self.heap, (ticket.urgency.value, next(self.sequence), ticket, chunk))

    @property
    def has_turn(self) -> bool:
        """With the lock: whether a chunk may be claimed. What is read beside another takes its bandwidth."""
        if not self.heap or self.reading == self.most_reading:
            return False
        if self.most_soon is None or self.heap[0][0] == Urgency.NOW.value:
            return True
        return self.reading == self.reading_soon < self.most_soon

    def claim(self) -> tuple[Ticket, int, Urgency] | None:
        """With the lock: the chunk to read next, and as how urgent; None where the first is not wanted any more."""
        urgency, _, ticket, chunk = heapq.heappop(self.heap)
        if chunk not in ticket.unclaimed:
            return None
        ticket.unclaimed.discard(chunk)
        ticket.in_flight += 1
        if self.reading == 0:
            self._reading_since = perf_counter()
        self.reading += 1
        self.reading_soon += urgency == Urgency.SOON.value
        self.busy += 1
        return ticket, chunk, Urgency(urgency)

    def note_read(self, urgency: Urgency) -> None:
        """With the lock: a chunk that was claimed as so urgent has been read, or has failed."""
        self.reading -= 1
        self.reading_soon -= urgency is Urgency.SOON
        if self.reading == 0:
            self.reading_s += perf_counter() - self._reading_since

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, close the shards."""
        with self.lock:
            self.closed = True
            self.heap.clear()
            for ticket in list(self.unfinished):
                ticket.cancelled = True
                ticket.unclaimed.clear()
                self.finish_if_idle(ticket)
            self.work.notify_all()
        for thread in self.threads:
            thread.join()
        self.reader.close()

    def close_soon(self) -> None:
        """Close from another thread: whoever dropped the engine may be a reader that holds the lock."""
        _thread.start_new_thread(self.close, ())

    def note_error(self, ticket: Ticket, error: BaseException | None) -> None:
        """With the lock: a bundle of which a chunk failed is not read on."""
        if error is not None and ticket.error is None:
            ticket.error = error
            ticket.unclaimed.clear()

    def finish_if_idle(self, ticket: Ticket) -> None:
        """With the lock: tell whoever waits that no thread will write to the ticket's memory any more."""
        if not ticket.finished and ticket.in_flight == 0 and not ticket.unclaimed:
            ticket.finished = True
            self.unfinished.discard(ticket)
            self.done.notify_all()


def serve(queue: ReadQueue) -> None:
    """What a reader thread does until the queue is closed."""
    while True:
        with queue.lock:
            while not queue.closed and (queue.held or not queue.has_turn):
                queue.work.wait()
            if queue.closed:
                return
            claimed = queue.claim()
        if claimed is not None:
            for _ in serve_chunk(queue, *claimed):
                pass


def serve_chunk(queue: ReadQueue, ticket: Ticket, chunk: int, urgency: Urgency) -> Iterator[None]:
    """Read a claimed chunk, and check the bundle if it was the last. Pauses wherever other threads may come between."""
    yield
    error = _read_chunk(queue, ticket, chunk)
    yield
    with queue.lock:
        ticket.unread -= 1
        queue.note_read(urgency)
        # Another thread reads while this one checks.
        queue.work.notify()
        queue.note_error(ticket, error)
        whole = ticket.unread == 0 and ticket.error is None and not ticket.cancelled
    yield
    error = check_bundle(queue.reader, ticket.request) if whole else None
    yield
    with queue.lock:
        ticket.in_flight -= 1
        queue.busy -= 1
        queue.note_error(ticket, error)
        queue.finish_if_idle(ticket)
        if queue.held:
            queue.done.notify_all()


def _read_chunk(queue: ReadQueue, ticket: Ticket, chunk: int) -> BaseException | None:
    request = ticket.request
    start = chunk * queue.chunk_nbytes
    part = request.out[start : start + queue.chunk_nbytes]
    try:
        queue.reader.read(request.shard, request.offset + start, part)
    except BaseException as error:  # noqa: BLE001 - carried to whoever waits for the ticket
        return error
    return None


def read_whole(reader: Reader, request: ReadRequest) -> BaseException | None:
    """Read a bundle in one piece; what went wrong."""
    try:
        reader.read(request.shard, request.offset, request.out)
    except BaseException as error:  # noqa: BLE001 - carried to whoever waits for the ticket
        return error
    return None


def check_bundle(reader: Reader, request: ReadRequest) -> BaseException | None:
    """What is wrong with a bundle that arrived, if anything.

    A wrong checksum is read once more: a flip on the way is healed, one on the disk is reported.
    """
    out = request.out
    if request.checksum is None or not isinstance(out, memoryview):
        return None
    try:
        if request.wrong_part(out) is None:
            return None
        reader.read(request.shard, request.offset, out)
        wrong = request.wrong_part(out)
    except BaseException as error:  # noqa: BLE001 - carried to whoever waits for the ticket
        return error
    if wrong is None:
        return None
    start, found, expected = wrong
    return StoreCorruptError(
        f"{request.label} in {reader.paths[request.shard]} at byte {request.offset + start}: checksum "
        f"{found:016x}, expected {expected:016x}; {request.fix}"
    )
