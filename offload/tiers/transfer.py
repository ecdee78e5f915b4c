"""The transfer engine: reader threads that fill slots, urgent ones first.

A request is cut into chunks, so that several threads work on one expert and a read that is needed now overtakes one
that is only wanted soon. A ticket is finished when no thread will write to its memory any more, whether it is done,
failed or cancelled: only then may the memory be used for something else.
"""

from __future__ import annotations

import _thread
import atexit
import heapq
import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from offload.errors import ClosedError, StoreCorruptError

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


@dataclass(frozen=True)
class ReadRequest:
    """One bundle to read.

    Attributes:
        shard: index of the store's shard.
        offset: bytes from the shard's start.
        out: where it goes, writable, as long as the bundle, on whatever device.
        checksum: xxh3-64 of the bundle; None where the host cannot read what arrived.
        label: names the expert in messages.
    """

    shard: int
    offset: int
    out: Span
    checksum: int | None
    label: str


class Ticket:
    """The completion of one read. Written under the engine's lock, read by anyone."""

    __slots__ = ("cancelled", "error", "finished", "in_flight", "request", "unclaimed", "unread", "urgency")

    def __init__(self, request: ReadRequest, chunks: int, urgency: Urgency) -> None:
        self.request = request
        self.urgency = urgency
        self.unclaimed = set(range(chunks))
        self.unread = chunks
        self.in_flight = 0
        self.finished = False
        self.cancelled = False
        self.error: BaseException | None = None

    @property
    def succeeded(self) -> bool:
        """True when the bundle is there, whole and checked."""
        return self.finished and self.error is None and not self.cancelled


class _Queue:
    """What reader threads share; holds no reference to the engine, so that an engine can be collected."""

    def __init__(self, reader: Reader, chunk_nbytes: int, most_reading: int) -> None:
        self.reader = reader
        self.chunk_nbytes = chunk_nbytes
        self.most_reading = most_reading
        self.heap: list[tuple[int, int, Ticket, int]] = []
        self.sequence = itertools.count()
        self.unfinished: set[Ticket] = set()
        self.threads: list[threading.Thread] = []
        self.reading = 0
        self.busy = 0
        self.held = False
        self.closed = False
        self.renew_locks()

    def renew_locks(self) -> None:
        # Taken by `with lock`, never `with condition`: an interrupt can leave a condition's lock taken.
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.done = threading.Condition(self.lock)

    def push(self, ticket: Ticket) -> None:
        for chunk in sorted(ticket.unclaimed):
            heapq.heappush(self.heap, (ticket.urgency.value, next(self.sequence), ticket, chunk))

    def close(self) -> None:
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
        if error is not None and ticket.error is None:
            ticket.error = error
            ticket.unclaimed.clear()

    def finish_if_idle(self, ticket: Ticket) -> None:
        if not ticket.finished and ticket.in_flight == 0 and not ticket.unclaimed:
            ticket.finished = True
            self.unfinished.discard(ticket)
            self.done.notify_all()


def _serve(queue: _Queue) -> None:
    while True:
        with queue.lock:
            while not queue.closed and (queue.held or not queue.heap or queue.reading == queue.most_reading):
                queue.work.wait()
            if queue.closed:
                return
            _, _, ticket, chunk = heapq.heappop(queue.heap)
            if chunk not in ticket.unclaimed:
                continue
            ticket.unclaimed.discard(chunk)
            ticket.in_flight += 1
            queue.reading += 1
            queue.busy += 1
        error = _read_chunk(queue, ticket, chunk)
        with queue.lock:
            ticket.unread -= 1
            queue.reading -= 1
            # Another thread reads while this one checks.
            queue.work.notify()
            queue.note_error(ticket, error)
            whole = ticket.unread == 0 and ticket.error is None and not ticket.cancelled
        error = _check(queue, ticket) if whole else None
        with queue.lock:
            ticket.in_flight -= 1
            queue.busy -= 1
            queue.note_error(ticket, error)
            queue.finish_if_idle(ticket)
            if queue.held:
                queue.done.notify_all()


def _read_chunk(queue: _Queue, ticket: Ticket, chunk: int) -> BaseException | None:
    request = ticket.request
    start = chunk * queue.chunk_nbytes
    part = request.out[start : start + queue.chunk_nbytes]
    try:
        queue.reader.read(request.shard, request.offset + start, part)
    except BaseException as error:  # noqa: BLE001 - carried to whoever waits for the ticket
        return error
    return None


def _check(queue: _Queue, ticket: Ticket) -> BaseException | None:
    """A wrong checksum is read once more: a flip on the way is healed, one on the disk is reported."""
    request = ticket.request
    out = request.out
    if request.checksum is None or not isinstance(out, memoryview):
        return None
    try:
        if xxhash.xxh3_64_intdigest(out) == request.checksum:
            return None
        queue.reader.read(request.shard, request.offset, out)
        found = xxhash.xxh3_64_intdigest(out)
    except BaseException as error:  # noqa: BLE001 - carried to whoever waits for the ticket
        return error
    if found == request.checksum:
        return None
    return StoreCorruptError(
        f"{request.label} in {queue.reader.paths[request.shard]} at byte {request.offset}: checksum {found:016x}, "
        f"expected {request.checksum:016x}; remove the store with `offload store rm` and load again"
    )


class ReadEngine:
    """Reader threads over a store's shards. Safe to use from several threads, and in a forked child."""

    def __init__(self, reader: Reader, *, threads: int, chunk_nbytes: int) -> None:
        """Start lazily: threads exist from the first request on.

        Args:
            reader: the open shards; closed with the engine.
            threads: reads in flight. One thread more than that, so that none is missing while a bundle is checked.
            chunk_nbytes: a multiple of 4 KiB.
        """
        if threads < 1 or chunk_nbytes < 4096 or chunk_nbytes % 4096:
            raise ValueError(f"{threads} reader threads with chunks of {chunk_nbytes} bytes: need >= 1, whole pages")
        self._queue = _Queue(reader, chunk_nbytes, threads)
        self._thread_count = threads
        self._finalizer = weakref.finalize(self, self._queue.close_soon)
        self._finalizer.atexit = False
        with _engines_lock:
            _ENGINES.add(self)

    @property
    def reader(self) -> Reader:
        """The shards that it reads."""
        return self._queue.reader

    def submit(self, request: ReadRequest, urgency: Urgency) -> Ticket:
        """Queue one read; returns at once.

        Raises:
            ClosedError: after `close()`.
            RuntimeError: the system gives no thread to read with.
        """
        queue = self._queue
        chunks = max(1, -(-len(request.out) // queue.chunk_nbytes))
        ticket = Ticket(request, chunks, urgency)
        with queue.lock:
            if queue.closed:
                raise ClosedError("the model's runtime was closed; load the model again")
            if not queue.threads:
                self._start()
            queue.unfinished.add(ticket)
            queue.push(ticket)
            queue.work.notify(chunks)
        return ticket

    def _start(self) -> None:
        for index in range(self._thread_count + 1):
            thread = threading.Thread(target=_serve, args=(self._queue,), name=f"offload-reader-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # Some readers are enough.
                if not self._queue.threads:
                    raise
                return
            self._queue.threads.append(thread)

    def promote(self, ticket: Ticket) -> None:
        """Serve a queued read before all that are only wanted soon."""
        queue = self._queue
        with queue.lock:
            if ticket.urgency is not Urgency.NOW:
                ticket.urgency = Urgency.NOW
                queue.push(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Drop what is not being read yet; the ticket finishes once running chunks have come in."""
        queue = self._queue
        with queue.lock:
            if not ticket.finished:
                ticket.cancelled = True
                ticket.unclaimed.clear()
                queue.finish_if_idle(ticket)

    def cancel_all(self) -> None:
        """Cancel every read and return when none writes any more."""
        queue = self._queue
        with queue.lock:
            for ticket in list(queue.unfinished):
                ticket.cancelled = True
                ticket.unclaimed.clear()
                queue.finish_if_idle(ticket)
            while queue.unfinished:
                queue.done.wait()

    def wait_any(self, tickets: Iterable[Ticket]) -> None:
        """Return when at least one of the tickets is finished, whatever its outcome."""
        waiting = tuple(tickets)
        with self._queue.lock:
            while not any(ticket.finished for ticket in waiting):
                self._queue.done.wait()

    def wait_all(self, tickets: Iterable[Ticket]) -> None:
        """Return when all of the tickets are finished."""
        waiting = tuple(tickets)
        with self._queue.lock:
            while not all(ticket.finished for ticket in waiting):
                self._queue.done.wait()

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, close the shards. May be called again."""
        self._finalizer.detach()
        self._queue.close()

    def restart_in_child(self) -> None:
        """After a fork: the parent's reader threads are not here, what they were doing is cancelled."""
        queue = self._queue
        queue.reader.renew_lock()
        # The conditions list the parent's threads as waiting: they would take the wake-ups of this process's.
        queue.renew_locks()
        queue.held = False
        queue.heap.clear()
        queue.threads.clear()
        with queue.lock:
            for ticket in list(queue.unfinished):
                ticket.cancelled = True
                ticket.unclaimed.clear()
                queue.finish_if_idle(ticket)

    def hold(self) -> None:
        """Before a fork: no thread changes the queue or reads.

        A child takes a copy of the memory that a direct read writes to, and then either process may miss the bytes
        (open(2), notes on O_DIRECT).
        """
        queue = self._queue
        queue.lock.acquire()
        queue.held = True
        while queue.busy:
            queue.done.wait()

    def let_go(self) -> None:
        """After a fork, in the parent."""
        queue = self._queue
        queue.held = False
        queue.work.notify_all()
        queue.lock.release()


_ENGINES: weakref.WeakSet[ReadEngine] = weakref.WeakSet()
_engines_lock = threading.Lock()
_held_for_fork: list[ReadEngine] = []


def _before_fork() -> None:
    _engines_lock.acquire()
    for engine in list(_ENGINES):
        engine.hold()
        _held_for_fork.append(engine)


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        _held_for_fork.pop().let_go()
    _engines_lock.release()


def _after_fork_in_child() -> None:
    _held_for_fork.clear()
    for engine in list(_ENGINES):
        engine.restart_in_child()
    _engines_lock.release()


@atexit.register
def _close_engines() -> None:
    for engine in list(_ENGINES):
        engine.close()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
