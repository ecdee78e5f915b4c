"""A transfer engine for direct reads from disk, whose threads run no Python while reads go well.

What its queue does is what `ReadEngine`'s does (`cpu_kernels/read_queue_kernel.py`): a reader that needs the GIL for
each read waits for it while a step runs Python, and holds it while the step needs it.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from collections.abc import Iterable
from ctypes import addressof, c_char
from functools import cache
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels import read_queue_kernel as kernel
from cpu_kernels.compiling.compiler import direct
from cpu_kernels.xxh3_kernel import SHORTEST_NBYTES
from offload.errors import ClosedError
from offload.tiers.disk import ShardReader
from offload.tiers.read_queue import ReadRequest, Urgency, check_bundle, read_whole
from offload.tiers.transfer import Engine, ReadEngine, check_engine, hold_at_forks

Ints = npt.NDArray[np.int64]

_REQUESTED = Struct(f"{kernel.PARTS - kernel.URGENCY + 1}q")
"""A ticket's words from URGENCY to PARTS."""

_LEAST_KEPT = 16
"""Tickets among which finished ones are looked for."""


@cache
def uint64s(count: int) -> Struct:
    """Packs so many checksums."""
    return Struct(f"{count}Q")


def make_engine(reader: ShardReader, *, threads: int, chunk_nbytes: int, most_soon: int | None = None) -> Engine:
    """The engine for a store's shards: in compiled code where they are read past the page cache.

    Where the file system refuses that, of which a warning has told, reads go the reader's own way.
    """
    make = DirectEngine if reader.direct else ReadEngine
    return make(reader, threads=threads, chunk_nbytes=chunk_nbytes, most_soon=most_soon)


class DirectTicket:
    """The completion of one read; see `Ticket`. Its words are written by reader threads, under the queue's mutex."""

    __slots__ = ("_words", "address", "error", "request", "urgency")

    def __init__(self, request: ReadRequest, fd: int, urgency: Urgency) -> None:
        """Of a request all of whose checksums are known, of parts of more than 240 bytes, or none.

        Raises:
            ValueError: the memory is not contiguous, or parts are shorter.
        """
        expected = request.checksum if isinstance(request.checksum, tuple) else (request.checksum,)
        known = [one for one in expected if one is not None]
        nbytes = len(request.out)
        if known and (len(known) < len(expected) or nbytes // len(expected) < SHORTEST_NBYTES):
            raise ValueError(f"{request.label}: {nbytes} bytes with the checksums {expected}")
        self.request = request
        self.urgency = urgency
        self.error: BaseException | None = None
        # A ticket is made for every read, and looked at at every turn: NumPy takes ten times as long for a few words.
        words = bytearray(8 * (kernel.TICKET_WORDS + len(known)))
        self.address = addressof(c_char.from_buffer(words))
        # Where shards are not read directly any more there is no descriptor, and the reader is asked.
        _REQUESTED.pack_into(
            words, 8 * kernel.URGENCY, urgency.value, 0, fd, request.offset,
            addressof(c_char.from_buffer(request.out)), nbytes, len(known),  # type: ignore[arg-type]
        )  # fmt: skip
        uint64s(len(known)).pack_into(words, 8 * kernel.TICKET_WORDS, *known)
        self._words = memoryview(words).cast("q")

    @property
    def begun(self) -> bool:
        """True when a thread has begun to read a part of it, or was kept from that."""
        return self._words[kernel.CLAIMED] != 0

    @property
    def finished(self) -> bool:
        """True when no thread will write to its memory any more."""
        return self._words[kernel.FINISHED] != 0

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled before it finished."""
        return self._words[kernel.CANCELLED] != 0

    @property
    def succeeded(self) -> bool:
        """True when the bundle is there, whole and checked."""
        words = self._words
        return words[kernel.FINISHED] != 0 and self.error is None and not words[kernel.CANCELLED]

    @property
    def failure(self) -> int:
        """What the compiled reader found: 0, or `SHORT` or `WRONG` of the kernel."""
        return self._words[kernel.FAILURE]

    def finish_unread(self) -> None:
        """Nobody reads it: the queue is closed, or its threads are those of the process that was forked."""
        if not self.finished:
            self._words[kernel.CANCELLED] = 1
            self._words[kernel.FINISHED] = 1


class DirectQueue:
    """What reader threads share; holds no reference to the engine, so that an engine can be collected."""

    def __init__(self, reader: ShardReader, threads: int, chunk_nbytes: int, most_soon: int | None) -> None:
        self.reader = reader
        self.threads: list[threading.Thread] = []
        self._kept: dict[int, DirectTicket] = {}
        self.lock = threading.Lock()
        self.words: Ints = np.zeros(kernel.QUEUE_WORDS, np.int64)
        self.address = int(self.words.ctypes.data)
        self._settings = {
            kernel.MOST_READING: threads,
            kernel.MOST_SOON: -1 if most_soon is None else most_soon,
            kernel.CHUNK_NBYTES: chunk_nbytes,
        }
        self._serve, self._end_service = direct(kernel.serve), direct(kernel.end_service)
        self._cancel, self._close = direct(kernel.cancel), direct(kernel.close)
        self._wait = direct(kernel.wait)
        self._most_kept = _LEAST_KEPT
        self.renew()

    def renew(self) -> None:
        """Nobody waits, holds the mutex or reads; what was closed stays so, and what was counted."""
        kept = {word: self.words[word] for word in (kernel.CLOSED, kernel.BYTES_READ, kernel.READING_NS)}
        self.words[:] = 0
        for word, value in {**kept, **self._settings}.items():
            self.words[word] = value

    def keep(self, ticket: DirectTicket) -> None:
        """With the lock: its words must last until it is finished."""
        if len(self._kept) >= self._most_kept:
            self._kept = {at: one for at, one in self._kept.items() if not one.finished}
            self._most_kept = max(_LEAST_KEPT, 2 * len(self._kept))
        self._kept[ticket.address] = ticket

    @property
    def unfinished(self) -> list[DirectTicket]:
        """Tickets to whose memory a thread may still write."""
        return [ticket for ticket in self._kept.values() if not ticket.finished]

    def cancel_all(self) -> list[DirectTicket]:
        """Cancel every read; those that are not finished yet."""
        with self.lock:
            tickets = self.unfinished
        for ticket in tickets:
            self._cancel(self.address, ticket.address)
        return tickets

    def wait(self, tickets: Iterable[DirectTicket], *, every: bool) -> None:
        """Return when one, or every one, of the tickets is finished."""
        # The tickets must live as long as somebody looks at their words.
        waiting = tuple(tickets)
        count = len(waiting) if every else 1
        if sum(ticket.finished for ticket in waiting) < count:
            addresses = np.array([ticket.address for ticket in waiting], np.int64)
            while not self._wait(self.address, addresses, count):
                pass

    def serve(self) -> None:
        """What a reader thread does until the queue is closed."""
        while address := self._serve(self.address):
            self.go_on_with(address)

    def go_on_with(self, address: int) -> None:
        """Finish what a compiled reader could not: read again what did not come, and once more what is wrong."""
        # Without the lock: a fork that waits for this thread holds it.
        ticket = self._kept[address]
        ticket.error = self._found_wrong(ticket)
        self._end_service(self.address, address)

    def _found_wrong(self, ticket: DirectTicket) -> BaseException | None:
        if ticket.failure == kernel.SHORT:
            error = read_whole(self.reader, ticket.request)
            if error is not None:
                return error
        return check_bundle(self.reader, ticket.request)

    def close(self) -> None:
        """Cancel what is queued, wait for what is running, close the shards."""
        self._close(self.address)
        self.cancel_all()
        for thread in self.threads:
            thread.join()
        self.reader.close()

    def close_soon(self) -> None:
        """Close from another thread: whoever dropped the engine may be a reader."""
        _thread.start_new_thread(self.close, ())


class DirectEngine:
    """Reader threads over a store's shards; see `ReadEngine`. Safe to use from several threads, and in a forked child.

    A read that the system does not carry out whole, or whose checksum is wrong, goes on in Python, with the reader's
    retries, errors and warnings.
    """

    def __init__(self, reader: ShardReader, *, threads: int, chunk_nbytes: int, most_soon: int | None = None) -> None:
        """Start lazily: threads exist from the first request on; arguments as of `ReadEngine`."""
        check_engine(threads, chunk_nbytes)
        self._queue = DirectQueue(reader, threads, chunk_nbytes, most_soon)
        self._thread_count = threads
        self._submit, self._promote = direct(kernel.submit), direct(kernel.promote)
        self._cancel = direct(kernel.cancel)
        reader.also_reads(self._queue.words[kernel.BYTES_READ :][:1])
        self._finalizer = weakref.finalize(self, self._queue.close_soon)
        self._finalizer.atexit = False
        hold_at_forks(self)

    @property
    def reader(self) -> ShardReader:
        """The shards that it reads."""
        return self._queue.reader

    @property
    def reading_s(self) -> float:
        """Seconds since the start in which at least one read was in flight, as of the last moment in which none was."""
        return 1e-9 * float(self._queue.words[kernel.READING_NS])

    def submit(self, request: ReadRequest, urgency: Urgency) -> DirectTicket:
        """See `ReadEngine.submit`."""
        queue = self._queue
        ticket = DirectTicket(request, queue.reader.direct_fd(request.shard), urgency)
        with queue.lock:
            if not queue.threads:
                self._start()
            queue.keep(ticket)
            if not self._submit(queue.address, ticket.address):
                ticket.finish_unread()
                raise ClosedError("the model's runtime was closed; load the model again")
        return ticket

    def _start(self) -> None:
        queue = self._queue
        if queue.words[kernel.CLOSED]:
            return
        for index in range(self._thread_count + 1):
            thread = threading.Thread(target=queue.serve, name=f"offload-reader-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # Some readers are enough.
                if not queue.threads:
                    raise
                return
            queue.threads.append(thread)

    def promote(self, ticket: Any) -> None:
        """See `ReadEngine.promote`."""
        if ticket.urgency is not Urgency.NOW:
            ticket.urgency = Urgency.NOW
            self._promote(self._queue.address, ticket.address)

    def cancel(self, ticket: Any) -> None:
        """See `ReadEngine.cancel`."""
        self._cancel(self._queue.address, ticket.address)

    def cancel_all(self) -> None:
        """See `ReadEngine.cancel_all`."""
        self._queue.wait(self._queue.cancel_all(), every=True)

    def wait_any(self, tickets: Iterable[Any]) -> None:
        """See `ReadEngine.wait_any`."""
        self._queue.wait(tickets, every=False)

    def wait_all(self, tickets: Iterable[Any]) -> None:
        """See `ReadEngine.wait_all`."""
        self._queue.wait(tickets, every=True)

    def close(self) -> None:
        """See `ReadEngine.close`."""
        self._finalizer.detach()
        self._queue.close()

    # --- forks -----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Before a fork: see `ReadEngine.hold`."""
        self._queue.lock.acquire()
        direct(kernel.hold)(self._queue.address)

    def let_go(self) -> None:
        """After a fork, in the parent."""
        direct(kernel.let_go)(self._queue.address)
        self._queue.lock.release()

    def restart_in_child(self) -> None:
        """After a fork: the parent's reader threads are not here, what they were doing is cancelled."""
        queue = self._queue
        queue.reader.renew_lock()
        queue.lock = threading.Lock()
        queue.renew()
        queue.threads.clear()
        for ticket in queue.unfinished:
            ticket.finish_unread()
