"""The transfer engine: reader threads that fill slots, urgent ones first.

A request is cut into chunks, so that several threads work on one expert and a read that is needed now overtakes one
that is only wanted soon. A ticket is finished when no thread will write to its memory any more, whether it is done,
failed or cancelled: only then may the memory be used for something else.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from offload.errors import ClosedError
from offload.tiers.read_queue import Reader, ReadQueue, ReadRequest, Ticket, Urgency, serve

__all__ = ["Completion", "Engine", "ReadEngine", "ReadRequest", "Reader", "Ticket", "Urgency"]


class Completion(Protocol):
    """What an engine tells of one read; see `Ticket`."""

    @property
    def begun(self) -> bool:
        """True when a thread has begun to read a part of it."""
        ...

    @property
    def finished(self) -> bool:
        """True when no thread will write to its memory any more."""
        ...

    @property
    def succeeded(self) -> bool:
        """True when the bundle is there, whole and checked."""
        ...

    @property
    def error(self) -> BaseException | None:
        """Why it failed."""
        ...


class Engine(Protocol):
    """What a tier asks for reads; each call is explained at `ReadEngine`."""

    @property
    def reader(self) -> Reader:
        """What it reads from."""
        ...

    @property
    def reading_s(self) -> float:
        """Seconds in which at least one read was in flight."""
        ...

    def submit(self, request: ReadRequest, urgency: Urgency) -> Completion:
        """Queue one read."""
        ...

    def promote(self, ticket: Any) -> None:
        """Serve a queued read before all that are only wanted soon."""
        ...

    def cancel(self, ticket: Any) -> None:
        """Drop what is not being read yet."""
        ...

    def cancel_all(self) -> None:
        """Cancel every read and return when none writes any more."""
        ...

    def wait_any(self, tickets: Iterable[Any]) -> None:
        """Return when at least one is finished."""
        ...

    def wait_all(self, tickets: Iterable[Any]) -> None:
        """Return when all are finished."""
        ...

    def close(self) -> None:
        """Cancel, wait and close the shards."""
        ...


class HeldAtForks(Protocol):
    """What has threads that must not read while the process is copied."""

    def hold(self) -> None:
        """Before a fork."""
        ...

    def let_go(self) -> None:
        """After it, in the parent."""
        ...

    def restart_in_child(self) -> None:
        """After it, in the child."""
        ...

    def close(self) -> None:
        """At the end of the process."""
        ...


def check_engine(threads: int, chunk_nbytes: int) -> None:
    """Refuse what no engine can be made with.

    Raises:
        ValueError: no thread, or chunks that are not whole pages.
    """
    if threads < 1 or chunk_nbytes < 4096 or chunk_nbytes % 4096:
        raise ValueError(f"{threads} reader threads with chunks of {chunk_nbytes} bytes: need >= 1, whole pages")


class ReadEngine:
    """Reader threads over a store's shards. Safe to use from several threads, and in a forked child."""

    def __init__(self, reader: Reader, *, threads: int, chunk_nbytes: int, most_soon: int | None = None) -> None:
        """Start lazily: threads exist from the first request on.

        Args:
            reader: the open shards; closed with the engine.
            threads: reads in flight. One thread more than that, so that none is missing while a bundle is checked.
            chunk_nbytes: a multiple of 4 KiB.
            most_soon: of the reads in flight, how many may be such as are only wanted soon, and these only while none
                is in flight that is needed now: where one read can take the whole bandwidth, others beside it make it
                late. None where that does not matter.
        """
        check_engine(threads, chunk_nbytes)
        self._queue = ReadQueue(reader, chunk_nbytes, threads, most_soon)
        self._thread_count = threads
        self._finalizer = weakref.finalize(self, self._queue.close_soon)
        self._finalizer.atexit = False
        hold_at_forks(self)

    @property
    def reader(self) -> Reader:
        """The shards that it reads."""
        return self._queue.reader

    @property
    def reading_s(self) -> float:
        """Seconds since the start in which at least one read was in flight, as of the last moment in which none was."""
        return self._queue.reading_s

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
            thread = threading.Thread(target=serve, args=(self._queue,), name=f"offload-reader-{index}", daemon=True)
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


_ENGINES: weakref.WeakSet[HeldAtForks] = weakref.WeakSet()
_engines_lock = threading.Lock()
_held_for_fork: list[HeldAtForks] = []


def hold_at_forks(engine: HeldAtForks) -> None:
    """Hold an engine at every fork from now on, and close it when the process ends, as long as it lives."""
    with _engines_lock:
        _ENGINES.add(engine)


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
