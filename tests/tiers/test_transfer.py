"""The read engine under schedules that the test decides: order, cancellation, faults, closing, forks, collection."""

from __future__ import annotations

import errno
import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

import numpy as np
import pytest

from offload.errors import ClosedError, StorageError, StoreCorruptError
from offload.tiers.transfer import ReadEngine, ReadRequest, Ticket, Urgency
from tests.tiers.children import exit_code_of, fork_beside
from tests.tiers.readers import PATIENCE_S, Bytes, Call, Gate, MemoryReader, random_bytes
from tests.tiers.threads import refuse_threads

PAGE = 4096
SHARD_PAGES = 64
POISON = 0xA5

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@dataclass
class Rig:
    reader: MemoryReader
    engine: ReadEngine
    gate: Gate

    def submit(
        self, page: int, pages: int = 1, urgency: Urgency = Urgency.NOW, **options: bool
    ) -> tuple[Ticket, Bytes]:
        out = np.full(pages * PAGE, POISON, np.uint8)
        return self.engine.submit(self.reader.request(page * PAGE, out, **options), urgency), out

    def settle(self) -> list[Call]:
        """The reads that wait, once every reader thread either waits in one or has nothing to do."""
        queue = self.engine._queue
        deadline = monotonic() + PATIENCE_S
        with self.gate.changed:
            while True:
                with queue.lock:
                    queued = any(ticket.unclaimed for ticket in queue.unfinished)
                    still = queue.busy == len(self.gate.waiting)
                    if still and (not queued or queue.reading == queue.most_reading):
                        return list(self.gate.waiting)
                assert monotonic() < deadline, "readers do not settle"
                self.gate.changed.wait(0.0005)

    def holds(self, out: Bytes, page: int) -> bool:
        return np.array_equal(out, self.reader.shard[page * PAGE : page * PAGE + out.size])


MakeRig = Callable[..., Rig]


@pytest.fixture
def make() -> Iterator[MakeRig]:
    rigs = []

    def make(*, threads: int = 2, gated: bool = False, chunk_pages: int = 1) -> Rig:
        reader = MemoryReader(random_bytes(SHARD_PAGES * PAGE, seed=3))
        gate = Gate(opened=not gated)
        reader.before_read = gate
        rig = Rig(reader, ReadEngine(reader.as_shard_reader(), threads=threads, chunk_nbytes=chunk_pages * PAGE), gate)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.gate.open()
        rig.engine.close()
        assert all(not thread.is_alive() for thread in rig.engine._queue.threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pages", [1, 2, 3, 7])
def test_a_bundle_arrives_whole(make: MakeRig, threads: int, pages: int) -> None:
    rig = make(threads=threads, chunk_pages=2)
    ticket, out = rig.submit(5, pages)
    rig.engine.wait_all([ticket])
    assert ticket.succeeded
    assert rig.holds(out, 5)
    assert sorted(rig.reader.calls) == [
        (page * PAGE, min(2, 5 + pages - page) * PAGE) for page in range(5, 5 + pages, 2)
    ]


def test_waiting_for_finished_tickets_returns(make: MakeRig) -> None:
    rig = make()
    tickets = [rig.submit(page)[0] for page in range(9)]
    rig.engine.wait_all(tickets)
    rig.engine.wait_any(tickets)
    rig.engine.wait_all([])
    assert all(ticket.succeeded for ticket in tickets)


def test_an_engine_needs_a_thread_and_whole_pages(make: MakeRig) -> None:
    reader = make().reader.as_shard_reader()
    for threads, chunk in ((0, PAGE), (1, 0), (1, 100), (1, PAGE + 512)):
        with pytest.raises(ValueError, match="whole pages"):
            ReadEngine(reader, threads=threads, chunk_nbytes=chunk)


# --- order ---------------------------------------------------------------------------------------------------


def _serve_one_by_one(rig: Rig) -> list[int]:
    """Let reads go one at a time until none is queued; their pages in the order in which they were served."""
    order = []
    while calls := rig.settle():
        (call,) = calls
        order.append(call.offset // PAGE)
        rig.gate.let_go(call)
    return order


def test_urgent_reads_overtake_chunk_by_chunk(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    rig.submit(0, pages=3, urgency=Urgency.SOON)
    rig.gate.wait_for(1)
    rig.submit(10, pages=2, urgency=Urgency.NOW)
    rig.submit(20, pages=1, urgency=Urgency.SOON)
    rig.submit(30, pages=1, urgency=Urgency.NOW)
    assert _serve_one_by_one(rig) == [0, 10, 11, 30, 1, 2, 20]


def test_a_promoted_read_overtakes(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    rig.submit(0)
    rig.gate.wait_for(1)
    rig.submit(10, urgency=Urgency.SOON)
    late, _ = rig.submit(20, pages=2, urgency=Urgency.SOON)
    rig.submit(30, urgency=Urgency.NOW)
    rig.engine.promote(late)
    rig.engine.promote(late)
    assert _serve_one_by_one(rig) == [0, 30, 20, 21, 10]
    assert late.succeeded
    rig.engine.promote(late)
    assert len(rig.reader.calls) == 5, "nothing was read twice"


# --- cancellation ----------------------------------------------------------------------------------------------


def test_a_queued_read_that_is_cancelled_never_starts(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    first, _ = rig.submit(0)
    rig.gate.wait_for(1)
    queued, out = rig.submit(10, pages=2)
    rig.engine.cancel(queued)
    assert queued.finished
    assert not queued.succeeded
    rig.gate.open()
    rig.engine.wait_all([first])
    last, _ = rig.submit(20)
    rig.engine.wait_all([last])
    assert (out == POISON).all()
    assert [offset // PAGE for offset, _ in rig.reader.calls] == [0, 20]


def test_a_running_read_that_is_cancelled_finishes_when_it_has_come_in(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    ticket, out = rig.submit(0, pages=3)
    (call,) = rig.gate.wait_for(1)
    rig.engine.cancel(ticket)
    assert not ticket.finished, "a thread still writes to its memory"
    rig.gate.let_go(call)
    rig.engine.wait_all([ticket])
    assert not ticket.succeeded
    assert ticket.error is None
    assert (out[PAGE:] == POISON).all()
    rig.engine.cancel(ticket)
    assert ticket.finished


def test_cancelling_all_waits_for_what_runs(make: MakeRig) -> None:
    rig = make(threads=2, gated=True)
    tickets = [rig.submit(page, pages=2)[0] for page in (0, 10, 20)]
    rig.gate.wait_for(2)
    done = threading.Event()

    def cancel() -> None:
        rig.engine.cancel_all()
        done.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    # The third ticket was not running: once it is finished, the cancellation is under way and waits.
    rig.engine.wait_all(tickets[2:])
    assert not done.is_set()
    rig.gate.open()
    thread.join(PATIENCE_S)
    assert done.is_set()
    assert all(ticket.finished and not ticket.succeeded for ticket in tickets)
    rig.engine.cancel_all()


# --- faults ------------------------------------------------------------------------------------------------------


def test_a_failed_chunk_fails_the_ticket_and_spares_the_rest(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    ticket, out = rig.submit(0, pages=4)
    good, good_out = rig.submit(10)
    (call,) = rig.gate.wait_for(1)
    rig.gate.let_go(call, StorageError(errno.EIO, "broken"))
    rig.gate.open()
    rig.engine.wait_all([ticket, good])
    assert isinstance(ticket.error, StorageError)
    assert ticket.error.errno == errno.EIO
    assert not ticket.succeeded
    assert (out == POISON).all(), "chunks of a failed bundle were read on"
    assert good.succeeded
    assert rig.holds(good_out, 10)


def test_a_flip_on_the_way_is_healed(make: MakeRig) -> None:
    rig = make()
    flips = [1]

    def flip(_offset: int, out: memoryview) -> None:
        with suppress(IndexError):
            out[100] ^= flips.pop()

    rig.reader.after_read = flip
    ticket, out = rig.submit(3, pages=3)
    rig.engine.wait_all([ticket])
    assert ticket.succeeded
    assert rig.holds(out, 3)
    assert rig.reader.calls[-1] == (3 * PAGE, 3 * PAGE), "read once more, as a whole"


def test_a_flip_on_the_disk_is_reported(make: MakeRig) -> None:
    rig = make()
    ticket, _ = rig.submit(3, pages=2, wrong_checksum=True)
    rig.engine.wait_all([ticket])
    assert not ticket.succeeded
    with pytest.raises(StoreCorruptError, match=rf"expert at {3 * PAGE} in /store/shard-0 .*checksum.*store rm"):
        raise ticket.error  # type: ignore[misc]


def test_a_fault_while_healing_is_carried(make: MakeRig) -> None:
    rig = make()

    def fail_second(_offset: int, nbytes: int) -> None:
        if nbytes == 2 * PAGE:
            raise StorageError(errno.EIO, "broken")

    rig.reader.before_read = fail_second
    ticket, _ = rig.submit(3, pages=2, wrong_checksum=True)
    rig.engine.wait_all([ticket])
    assert isinstance(ticket.error, StorageError)


def test_a_destination_that_cannot_be_hashed_fails_its_ticket_only(make: MakeRig) -> None:
    rig = make(threads=1)
    scattered = memoryview(np.full(2 * PAGE, POISON, np.uint8))[::2]  # type: ignore[arg-type]
    ticket = rig.engine.submit(ReadRequest(0, 0, scattered, 0, "odd"), Urgency.NOW)
    rig.engine.wait_all([ticket])
    assert not ticket.succeeded
    good, _ = rig.submit(1)
    rig.engine.wait_all([good])
    assert good.succeeded


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules(make: MakeRig, seed: int) -> None:
    """Whatever order reads finish, fail and are cancelled in: memory is left alone once its ticket is finished."""
    chance = random.Random(seed)
    rig = make(threads=chance.randint(1, 4), gated=True, chunk_pages=chance.randint(1, 2))
    tickets: list[tuple[Ticket, Bytes, int]] = []
    cancelled: set[int] = set()
    reused: set[int] = set()
    for _ in range(60):
        action = chance.choice(["submit", "submit", "serve", "serve", "serve", "cancel", "promote"])
        if action == "submit":
            page = chance.randrange(SHARD_PAGES - 5)
            ticket, out = rig.submit(page, chance.randint(1, 5), chance.choice(list(Urgency)))
            tickets.append((ticket, out, page))
        elif action == "serve":
            calls = rig.settle()
            if not calls:
                continue
            call = chance.choice(sorted(calls, key=lambda call: (call.offset, call.nbytes)))
            broken = chance.random() < 0.1
            rig.gate.let_go(call, StorageError(errno.EIO, "broken") if broken else None)
        elif tickets:
            number = chance.randrange(len(tickets))
            if action == "cancel":
                cancelled.add(number)
                rig.engine.cancel(tickets[number][0])
            else:
                rig.engine.promote(tickets[number][0])
        for number, (ticket, out, page) in enumerate(tickets):
            if ticket.finished and number not in reused:
                if ticket.succeeded:
                    assert rig.holds(out, page)
                else:
                    assert number in cancelled or isinstance(ticket.error, StorageError)
                reused.add(number)
                out[:] = number % 251
    rig.gate.open()
    rig.engine.wait_all([ticket for ticket, _, _ in tickets])
    for number, (ticket, out, page) in enumerate(tickets):
        if number in reused:
            assert (out == number % 251).all(), "memory was written after its ticket was finished"
        elif ticket.succeeded:
            assert rig.holds(out, page)
    assert not rig.engine._queue.unfinished
    assert rig.engine._queue.reading == 0


# --- closing and collection ----------------------------------------------------------------------------------------


def test_closing_cancels_what_waits_and_awaits_what_runs(make: MakeRig) -> None:
    rig = make(threads=2, gated=True)
    tickets = [rig.submit(page) for page in range(6)]
    rig.gate.wait_for(2)
    closing = threading.Thread(target=rig.engine.close)
    closing.start()
    rig.engine.wait_any([ticket for ticket, _ in tickets[2:]])
    assert not rig.reader.closed.is_set(), "the shards were closed under a running read"
    rig.gate.open()
    closing.join(PATIENCE_S)
    assert rig.reader.closed.is_set()
    assert all(ticket.finished and not ticket.succeeded for ticket, _ in tickets)
    assert all((out == POISON).all() for _, out in tickets[2:])
    assert len(rig.reader.calls) == 2


def test_a_closed_engine_takes_nothing_and_closes_again(make: MakeRig) -> None:
    rig = make()
    rig.submit(0)
    rig.engine.close()
    rig.engine.close()
    with pytest.raises(ClosedError):
        rig.submit(1)
    rig.engine.cancel_all()


def test_closing_wakes_whoever_waits(make: MakeRig) -> None:
    rig = make(threads=1, gated=True)
    running, _ = rig.submit(0)
    queued, _ = rig.submit(1)
    rig.gate.wait_for(1)
    waiting = threading.Thread(target=rig.engine.wait_all, args=([running, queued],))
    waiting.start()
    closing = threading.Thread(target=rig.engine.close)
    closing.start()
    rig.gate.open()
    for thread in (waiting, closing):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def _unowned(reader: MemoryReader) -> list[threading.Thread]:
    """An engine that has read something and is dropped; its threads."""
    engine = ReadEngine(reader.as_shard_reader(), threads=3, chunk_nbytes=PAGE)
    ticket = engine.submit(reader.request(0, np.empty(PAGE, np.uint8)), Urgency.NOW)
    engine.wait_all([ticket])
    return engine._queue.threads


def _assert_ended(threads: list[threading.Thread], reader: MemoryReader) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert reader.closed.wait(PATIENCE_S)


def test_an_engine_that_is_dropped_ends_its_threads() -> None:
    reader = MemoryReader(random_bytes(PAGE, seed=0))
    threads = _unowned(reader)
    gc.collect()
    _assert_ended(threads, reader)


def test_an_engine_that_never_read_closes_its_shards_when_dropped() -> None:
    reader = MemoryReader(random_bytes(PAGE, seed=0))
    engine = ReadEngine(reader.as_shard_reader(), threads=3, chunk_nbytes=PAGE)
    del engine
    gc.collect()
    assert reader.closed.wait(PATIENCE_S)


def test_an_engine_may_be_dropped_by_its_own_reader() -> None:
    """Garbage is collected on whichever thread allocates: a reader may be the one, inside a read."""
    reader = MemoryReader(random_bytes(2 * PAGE, seed=0))
    engines = [ReadEngine(reader.as_shard_reader(), threads=2, chunk_nbytes=PAGE)]
    queue = engines[0]._queue
    ready = threading.Event()

    def drop(_offset: int, _nbytes: int) -> None:
        assert ready.wait(PATIENCE_S)
        engines.clear()
        gc.collect()

    reader.before_read = drop
    engines[0].submit(reader.request(0, np.empty(2 * PAGE, np.uint8)), Urgency.NOW)
    ready.set()
    _assert_ended(queue.threads, reader)


def test_an_engine_may_be_dropped_under_its_own_lock() -> None:
    reader = MemoryReader(random_bytes(PAGE, seed=0))
    engine = ReadEngine(reader.as_shard_reader(), threads=1, chunk_nbytes=PAGE)
    queue = engine._queue
    engines = [engine]
    del engine

    def drop() -> None:
        with queue.lock:
            engines.clear()
            gc.collect()

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the finalizer waits for a lock that its own thread holds"
    assert reader.closed.wait(PATIENCE_S)


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_the_system_refuses(make: MakeRig, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(threads=3)
    refuse_threads(monkeypatch, after=started)
    if not started:
        with pytest.raises(RuntimeError, match="can't start"):
            rig.submit(0)
        monkeypatch.undo()
    ticket, out = rig.submit(7, pages=3)
    rig.engine.wait_all([ticket])
    assert rig.holds(out, 7)
    assert len(rig.engine._queue.threads) == (started or 4)
    assert not rig.engine._queue.unfinished


# --- forks ---------------------------------------------------------------------------------------------------------


def _read_some(rig: Rig) -> None:
    for page in range(12):
        ticket, out = rig.submit(page)
        rig.engine.wait_all([ticket])
        assert ticket.succeeded
        assert rig.holds(out, page)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_forked_child_reads_with_threads_of_its_own(make: MakeRig, threads: int, used_before: bool) -> None:
    rig = make(threads=threads)
    if used_before:
        _read_some(rig)

    def child() -> None:
        _read_some(rig)
        rig.engine.close()

    assert exit_code_of(child) == 0
    _read_some(rig)
    assert not rig.reader.closed.is_set(), "the child's close is its own"


def test_a_childs_child_reads_too(make: MakeRig) -> None:
    rig = make(threads=3)
    _read_some(rig)

    def child() -> None:
        _read_some(rig)
        assert exit_code_of(lambda: _read_some(rig)) == 0
        _read_some(rig)

    assert exit_code_of(child) == 0


def test_a_fork_waits_for_reads_in_progress_and_cancels_queued_ones_in_the_child(make: MakeRig) -> None:
    rig = make(threads=2, gated=True)
    tickets = [rig.submit(page) for page in range(5)]
    rig.gate.wait_for(2)
    hold = rig.engine.hold

    def hold_and_tell() -> None:
        rig.gate.open()
        hold()

    # Reads are let go only when the fork is about to begin: it must still find none in progress.
    rig.engine.hold = hold_and_tell  # type: ignore[method-assign]

    def child() -> None:
        assert rig.reader.reading == 0, "a child was made while memory was being read into"
        for ticket, out in tickets:
            assert ticket.finished
            assert ticket.succeeded or (out == POISON).all()
        assert not rig.engine._queue.unfinished
        _read_some(rig)

    assert exit_code_of(child) == 0
    rig.engine.wait_all([ticket for ticket, _ in tickets])
    assert all(ticket.succeeded and rig.holds(out, page) for page, (ticket, out) in enumerate(tickets))


def test_forks_while_another_thread_reads(make: MakeRig) -> None:
    rig = make(threads=2)
    fork_beside(lambda: _read_some(rig))


def test_a_closed_engine_survives_a_fork(make: MakeRig) -> None:
    rig = make()
    _read_some(rig)
    rig.engine.close()

    def child() -> None:
        with pytest.raises(ClosedError):
            rig.submit(0)
        rig.engine.close()

    assert exit_code_of(child) == 0
