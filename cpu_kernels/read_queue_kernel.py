# mypy: allow-untyped-calls, allow-untyped-defs
"""A queue of direct reads, and reader threads that need no Python for a read that goes well.

The queue is a table of int64, zeroed, with a mutex and two conditions of POSIX threads in it, which are then ready; a
ticket is another, kept by whoever submits it until it is finished. Tickets that wait are two lists, of what is needed
now and of what is wanted soon. A reader takes a chunk, wakes another where more may be read beside it, reads, and
checks the bundle after its last chunk. Where that is not needed now and there is more to read, it reads on and another
checks: the disk would wait as long as it takes to wake one. A read that falls short or fails, and a checksum that is
wrong, it hands back to Python, which knows what to do about that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from cpu_kernels.atomics import atomic_add, atomic_exchange
from cpu_kernels.jit import c_function, carray, entry, inner, stack_words
from cpu_kernels.simd import int64_pointer
from cpu_kernels.xxh3_kernel import xxh3_64

# Words of a queue. The mutex and the conditions take at most 48 bytes each.
_MUTEX = 0
_WORK = 8
_DONE = 16
_CLOCK = 24  # two words for the system's clock, with the mutex
CLOSED = 26
HELD = 27  # 1 while no thread may begin
BUSY = 28  # chunks that a thread has not done with
READING = 29  # reads in flight
_READING_SOON = 30  # of them, those that were not urgent when they began
MOST_READING = 31
MOST_SOON = 32  # see `ReadEngine`; -1 for no limit
CHUNK_NBYTES = 33
BYTES_READ = 34
READING_NS = 35  # nanoseconds in which a read was in flight, up to when none was last
_SINCE_NS = 36
_FIRST = 37  # of two lists: needed now, wanted soon
_LAST = 39
UNCHECKED = 41  # the first of the tickets that are whole and wait for whoever checks them
QUEUE_WORDS = 48

# Words of a ticket.
_NEXT = 0
URGENCY = 1  # list in which it waits, or in which it last was
_WAITS = 2
FD = 3
OFFSET = 4
ADDRESS = 5
NBYTES = 6
PARTS = 7  # with a checksum each, in the words behind the ticket's; 0 for no check
CHUNKS = 8
CLAIMED = 9
_UNREAD = 10
_IN_FLIGHT = 11
CANCELLED = 12
FAILURE = 13
FINISHED = 14
TICKET_WORDS = 15

SHORT, WRONG = 1, 2
"""Failures: bytes did not come, or are not those that they should be."""

_MONOTONIC, _REALTIME = 1, 0
_NS_PER_S = 1_000_000_000
_PATIENCE_NS = 50_000_000

_lock = c_function("pthread_mutex_lock", types.int32, types.int64)
_unlock = c_function("pthread_mutex_unlock", types.int32, types.int64)
_cond_wait = c_function("pthread_cond_wait", types.int32, types.int64, types.int64)
_cond_timedwait = c_function("pthread_cond_timedwait", types.int32, types.int64, types.int64, types.int64)
_signal = c_function("pthread_cond_signal", types.int32, types.int64)
_broadcast = c_function("pthread_cond_broadcast", types.int32, types.int64)
_clock_gettime = c_function("clock_gettime", types.int32, types.int32, types.int64)
_pread = c_function("pread", types.int64, types.int32, types.int64, types.int64, types.int64)


@inner
def _queue(state):
    return carray(int64_pointer(state), (QUEUE_WORDS,))


@inner
def _ticket(address):
    return carray(int64_pointer(address), (TICKET_WORDS,))


@inner
def _now_ns(state):
    _clock_gettime(_MONOTONIC, state + 8 * _CLOCK)
    queue = _queue(state)
    return queue[_CLOCK] * _NS_PER_S + queue[_CLOCK + 1]


@inner
def _append(state, urgency, address):
    queue, ticket = _queue(state), _ticket(address)
    ticket[URGENCY], ticket[_NEXT], ticket[_WAITS] = urgency, 0, 1
    if queue[_FIRST + urgency] == 0:
        queue[_FIRST + urgency] = address
    else:
        _ticket(queue[_LAST + urgency])[_NEXT] = address
    queue[_LAST + urgency] = address


@inner
def _remove(state, address):
    """Take a ticket that may wait off its list."""
    queue, ticket = _queue(state), _ticket(address)
    if ticket[_WAITS] == 0:
        return
    urgency, before = ticket[URGENCY], 0
    at = queue[_FIRST + urgency]
    while at != address:
        before, at = at, _ticket(at)[_NEXT]
    if before == 0:
        queue[_FIRST + urgency] = ticket[_NEXT]
    else:
        _ticket(before)[_NEXT] = ticket[_NEXT]
    if queue[_LAST + urgency] == address:
        queue[_LAST + urgency] = before
    ticket[_WAITS] = 0


@inner
def list_in_turn(state):
    """From which list a chunk may be read now; -1 for none. What is read beside another takes its bandwidth."""
    queue = _queue(state)
    if queue[READING] >= queue[MOST_READING] or queue[HELD] != 0:
        return -1
    if queue[_FIRST] != 0:
        return 0
    if queue[_FIRST + 1] == 0:
        return -1
    alone = queue[READING] == queue[_READING_SOON] and queue[READING] < queue[MOST_SOON]
    return 1 if queue[MOST_SOON] < 0 or alone else -1


@inner
def _tell_one(state):
    """Wake a thread if there is anything to do; it wakes the next."""
    if list_in_turn(state) >= 0 or _queue(state)[UNCHECKED] != 0:
        _signal(state + 8 * _WORK)


@inner
def _finish(state, address):
    # Whoever sees it finished sees its bytes.
    atomic_exchange(address + 8 * FINISHED, 1)
    _broadcast(state + 8 * _DONE)


@inner
def _leave(state):
    """A thread has done with a chunk."""
    queue = _queue(state)
    queue[BUSY] -= 1
    if queue[HELD] != 0 and queue[BUSY] == 0:
        _broadcast(state + 8 * _DONE)


@inner
def _is_idle(ticket):
    return ticket[_IN_FLIGHT] == 0 and (ticket[CLAIMED] == ticket[CHUNKS])


@inner
def _drop_unclaimed(state, address):
    ticket = _ticket(address)
    _remove(state, address)
    ticket[CLAIMED] = ticket[CHUNKS]


# What a reader does with a chunk, in the order of these functions; others may come between any two.


@inner
def begin(state, urgency):
    """With the mutex: the next chunk of a list, which is being read from now on."""
    queue = _queue(state)
    address = queue[_FIRST + urgency]
    ticket = _ticket(address)
    chunk = ticket[CLAIMED]
    ticket[CLAIMED] += 1
    ticket[_IN_FLIGHT] += 1
    if ticket[CLAIMED] == ticket[CHUNKS]:
        _remove(state, address)
    if queue[READING] == 0:
        queue[_SINCE_NS] = _now_ns(state)
    queue[READING] += 1
    queue[_READING_SOON] += urgency
    queue[BUSY] += 1
    return address, chunk


@inner
def read(state, address, chunk):
    """Whether a chunk came whole."""
    queue, ticket = _queue(state), _ticket(address)
    start = chunk * queue[CHUNK_NBYTES]
    nbytes = min(queue[CHUNK_NBYTES], ticket[NBYTES] - start)
    if _pread(np.int32(ticket[FD]), ticket[ADDRESS] + start, nbytes, ticket[OFFSET] + start) != nbytes:
        return False
    atomic_add(state + 8 * BYTES_READ, nbytes)
    return True


@inner
def note_read(state, address, urgency, arrived):
    """A chunk is not in flight any more; whether the bundle is whole, and to be checked."""
    queue, ticket = _queue(state), _ticket(address)
    _lock(state + 8 * _MUTEX)
    queue[READING] -= 1
    queue[_READING_SOON] -= urgency
    if queue[READING] == 0:
        queue[READING_NS] += _now_ns(state) - queue[_SINCE_NS]
    ticket[_UNREAD] -= 1
    if not arrived:
        ticket[FAILURE] = SHORT
        _drop_unclaimed(state, address)
    whole = ticket[_UNREAD] == 0 and ticket[FAILURE] == 0 and ticket[CANCELLED] == 0
    _unlock(state + 8 * _MUTEX)
    return whole


@inner
def hand_over(state, address):
    """Leave a bundle that is whole to another thread, if this one can read on at once; whether it does."""
    queue, ticket = _queue(state), _ticket(address)
    _lock(state + 8 * _MUTEX)
    reads_on = ticket[URGENCY] != 0 and list_in_turn(state) >= 0
    if reads_on:
        ticket[_NEXT] = queue[UNCHECKED]
        queue[UNCHECKED] = address
    else:
        _tell_one(state)
    _unlock(state + 8 * _MUTEX)
    return reads_on


@inner
def take_unchecked(state):
    """With the mutex: a ticket that was handed over; 0 for none."""
    queue = _queue(state)
    address = queue[UNCHECKED]
    if address != 0:
        queue[UNCHECKED] = _ticket(address)[_NEXT]
    return address


@inner
def is_right(address):
    """Whether a bundle has the checksums that it should have."""
    ticket = _ticket(address)
    parts = ticket[PARTS]
    expected = carray(int64_pointer(address + 8 * TICKET_WORDS), (parts,))
    step = ticket[NBYTES] // max(parts, 1)
    wrong = 0
    for part in range(parts):
        wrong |= np.int64(xxh3_64(ticket[ADDRESS] + part * step, step)) ^ expected[part]
    return wrong == 0


@inner
def leave(state, address, right):
    """A thread has done with a chunk; the ticket's address where Python must go on with it, else 0."""
    ticket, failed = _ticket(address), 0
    _lock(state + 8 * _MUTEX)
    if not right:
        ticket[FAILURE] = WRONG
    ticket[_IN_FLIGHT] -= 1
    if not _is_idle(ticket):
        _leave(state)
    elif ticket[FAILURE] != 0 and ticket[CANCELLED] == 0:
        # It stays in flight, and its thread busy.
        ticket[_IN_FLIGHT] = 1
        failed = address
        _tell_one(state)
    else:
        _finish(state, address)
        _leave(state)
    _unlock(state + 8 * _MUTEX)
    return failed


@entry("int64(int64)")
def serve(state: int) -> int:
    """What a reader thread does: returns the address of a ticket that Python must go on with, or 0 after `close`."""
    queue: Any = _queue(state)
    failed = 0
    while failed == 0:
        _lock(state + 8 * _MUTEX)
        urgency, address, chunk = -1, 0, 0
        while urgency < 0 and address == 0:
            if queue[CLOSED] == 0:
                urgency = list_in_turn(state)
            if urgency < 0:
                address = take_unchecked(state)
            if urgency < 0 and address == 0:
                if queue[CLOSED] != 0:
                    break
                _cond_wait(state + 8 * _WORK, state + 8 * _MUTEX)
        if urgency >= 0:
            address, chunk = begin(state, urgency)
            _tell_one(state)
        _unlock(state + 8 * _MUTEX)
        if address == 0:
            break
        if urgency < 0:
            failed = leave(state, address, is_right(address))
            continue
        arrived = read(state, address, chunk)
        whole = note_read(state, address, urgency, arrived)
        if not whole:
            failed = leave(state, address, True)
        elif not hand_over(state, address):
            failed = leave(state, address, is_right(address))
    return failed


@entry("void(int64, int64)")
def end_service(state: int, address: int) -> None:
    """Python has done what it could about a ticket that `serve` returned."""
    _lock(state + 8 * _MUTEX)
    ticket: Any = _ticket(address)
    ticket[_IN_FLIGHT] = 0
    _finish(state, address)
    _leave(state)
    _unlock(state + 8 * _MUTEX)


@entry("boolean(int64, int64)")
def submit(state: int, address: int) -> bool:
    """Queue a ticket as urgent as its word says, of which nothing has been read; False after `close`."""
    queue: Any = _queue(state)
    ticket: Any = _ticket(address)
    _lock(state + 8 * _MUTEX)
    opened = queue[CLOSED] == 0
    if opened:
        ticket[CHUNKS] = max(1, -(-ticket[NBYTES] // queue[CHUNK_NBYTES]))
        ticket[_UNREAD] = ticket[CHUNKS]
        _append(state, ticket[URGENCY], address)
        # What is needed now does not wait for one to wake the next.
        for _ in range(1 if ticket[URGENCY] != 0 else min(ticket[CHUNKS], queue[MOST_READING])):
            _tell_one(state)
    _unlock(state + 8 * _MUTEX)
    return bool(opened)


@entry("void(int64, int64)")
def promote(state: int, address: int) -> None:
    """Let a ticket wait behind those that are needed now."""
    ticket: Any = _ticket(address)
    _lock(state + 8 * _MUTEX)
    if ticket[URGENCY] != 0:
        if ticket[_WAITS] != 0:
            _remove(state, address)
            _append(state, 0, address)
            for _ in range(ticket[CHUNKS] - ticket[CLAIMED]):
                _tell_one(state)
        # Of what has been read: whoever read it checks it at once.
        ticket[URGENCY] = 0
    _unlock(state + 8 * _MUTEX)


@entry("void(int64, int64)")
def cancel(state: int, address: int) -> None:
    """Drop what is not being read yet; the ticket finishes once running chunks have come in."""
    ticket: Any = _ticket(address)
    _lock(state + 8 * _MUTEX)
    if ticket[FINISHED] == 0 and ticket[CANCELLED] == 0:
        ticket[CANCELLED] = 1
        _drop_unclaimed(state, address)
        if ticket[_IN_FLIGHT] == 0:
            _finish(state, address)
    _unlock(state + 8 * _MUTEX)


@inner
def _count_finished(addresses):
    finished = 0
    for index in range(len(addresses)):
        finished += _ticket(addresses[index])[FINISHED]
    return finished


@entry("boolean(int64, int64[::1], int64)")
def wait(state: int, addresses: Any, count: int) -> bool:
    """Whether so many of the tickets are finished; waits for that a while, short enough for signals to be served."""
    until = stack_words(2)
    deadline: Any = carray(int64_pointer(until), (2,))
    _clock_gettime(_REALTIME, until)
    deadline[1] += _PATIENCE_NS
    if deadline[1] >= _NS_PER_S:
        deadline[0] += 1
        deadline[1] -= _NS_PER_S
    _lock(state + 8 * _MUTEX)
    enough = _count_finished(addresses) >= count
    while not enough and _cond_timedwait(state + 8 * _DONE, state + 8 * _MUTEX, until) == 0:
        enough = _count_finished(addresses) >= count
    _unlock(state + 8 * _MUTEX)
    return bool(enough)


@entry("void(int64)")
def close(state: int) -> None:
    """Let readers return once they have done with what they read; tickets that wait are to be cancelled."""
    queue: Any = _queue(state)
    _lock(state + 8 * _MUTEX)
    queue[CLOSED] = 1
    _broadcast(state + 8 * _WORK)
    _unlock(state + 8 * _MUTEX)


@entry("void(int64)")
def hold(state: int) -> None:
    """Take the mutex when no thread reads; none begins until `let_go`, on the same thread."""
    queue: Any = _queue(state)
    _lock(state + 8 * _MUTEX)
    queue[HELD] = 1
    while queue[BUSY] != 0:
        _cond_wait(state + 8 * _DONE, state + 8 * _MUTEX)


@entry("void(int64)")
def let_go(state: int) -> None:
    """End `hold`."""
    queue: Any = _queue(state)
    queue[HELD] = 0
    _broadcast(state + 8 * _WORK)
    _unlock(state + 8 * _MUTEX)
