"""The engine of direct reads: from files with real threads, and its order against `ReadEngine`'s under one chance."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import xxhash
from numba.core.runtime import _nrt_python as numba_memory

from cpu_kernels import read_queue_kernel as kernel
from offload.errors import ClosedError, SlowReadWarning, StoreCorruptError
from offload.tiers.direct_engine import DirectEngine, DirectTicket, make_engine
from offload.tiers.disk import ShardReader
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from tests.tiers import scheduled_direct_engine as steps
from tests.tiers.children import exit_code_of, fork_beside
from tests.tiers.readers import PATIENCE_S, Bytes, MemoryReader, random_bytes
from tests.tiers.scheduled_direct_engine import FileReader, ScheduledDirectEngine, list_in_turn
from tests.tiers.scheduled_engine import ScheduledEngine
from tests.tiers.threads import refuse_threads

PAGE = 4096
SHARD_PAGES = 64
POISON = 0xA5

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Rig:
    """An engine over a file; buffered, so that it works on every file system."""

    def __init__(self, directory: Path, threads: int = 2, chunk_pages: int = 1) -> None:
        self.data = random_bytes(SHARD_PAGES * PAGE, seed=3)
        self.path = path = directory / "shard-0"
        path.write_bytes(self.data.tobytes())
        self.reader = ShardReader([path], lambda _index, _direct: os.open(path, os.O_RDONLY))
        engine = make_engine(self.reader, threads=threads, chunk_nbytes=chunk_pages * PAGE)
        assert isinstance(engine, DirectEngine)
        self.engine = engine

    def request(self, page: int, out: Bytes, wrong: int = 0) -> ReadRequest:
        checksum = xxhash.xxh3_64_intdigest(self.data[page * PAGE : page * PAGE + out.size]) ^ wrong
        return ReadRequest(0, page * PAGE, memoryview(out), checksum, f"expert at {page}")  # type: ignore[arg-type]

    def submit(
        self, page: int, pages: int = 1, urgency: Urgency = Urgency.NOW, wrong: int = 0
    ) -> tuple[DirectTicket, Bytes]:
        out = np.full(pages * PAGE, POISON, np.uint8)
        return self.engine.submit(self.request(page, out, wrong), urgency), out

    def read(self, page: int, pages: int = 1, **options: Any) -> tuple[DirectTicket, Bytes]:
        ticket, out = self.submit(page, pages, **options)
        self.engine.wait_all([ticket])
        return ticket, out

    def holds(self, out: Bytes, page: int) -> bool:
        return np.array_equal(out, self.data[page * PAGE : page * PAGE + out.size])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    one = Rig(tmp_path)
    yield one
    one.engine.close()
    assert all(not thread.is_alive() for thread in one.engine._queue.threads)


def test_readers_take_no_memory_of_their_own(rig: Rig) -> None:
    """Numba would let Python count it, from threads without the GIL."""
    rig.read(5, 3)
    numba_memory.memsys_enable_stats()
    try:
        before = numba_memory.memsys_get_stats_alloc()
        tickets = [rig.submit(page, 3)[0] for page in range(20)]
        deadline = monotonic() + PATIENCE_S
        # Not through the engine: the array that it hands to the kernel is counted, too.
        while not all(ticket.finished for ticket in tickets):
            assert monotonic() < deadline
        assert numba_memory.memsys_get_stats_alloc() == before
    finally:
        numba_memory.memsys_disable_stats()
    assert all(ticket.succeeded for ticket in tickets)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pages", [1, 2, 3, 7])
def test_a_bundle_arrives_whole(tmp_path: Path, threads: int, pages: int) -> None:
    rig = Rig(tmp_path, threads, chunk_pages=2)
    ticket, out = rig.read(5, pages)
    assert ticket.succeeded
    assert rig.holds(out, 5)
    assert rig.reader.bytes_read == pages * PAGE
    assert rig.engine.reading_s > 0
    rig.reader.bytes_read = 0
    rig.read(1)
    assert rig.reader.bytes_read == PAGE
    rig.engine.close()


def test_waiting_for_finished_tickets_returns(rig: Rig) -> None:
    tickets = [rig.submit(page)[0] for page in range(9)]
    rig.engine.wait_all(tickets)
    rig.engine.wait_any(tickets)
    rig.engine.wait_all([])
    assert all(ticket.succeeded for ticket in tickets)


def test_parts_have_checksums_of_their_own(rig: Rig) -> None:
    out = np.empty(4 * PAGE, np.uint8)
    parts = [xxhash.xxh3_64_intdigest(rig.data[page * PAGE : (page + 2) * PAGE]) for page in (8, 10)]
    for checksums, right in ((tuple(parts), True), ((parts[0], parts[0]), False), (None, True)):
        ticket = rig.engine.submit(ReadRequest(0, 8 * PAGE, memoryview(out), checksums, "two"), Urgency.NOW)  # type: ignore[arg-type]
        rig.engine.wait_any([ticket])
        assert ticket.succeeded is right


def test_what_cannot_be_checked_is_refused(rig: Rig) -> None:
    for nbytes, checksums in ((240, 1), (480, (1, 2)), (PAGE, (1, None))):
        out = memoryview(np.empty(nbytes, np.uint8))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="with the checksums"):
            rig.engine.submit(ReadRequest(0, 0, out, checksums, "odd"), Urgency.NOW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole pages"):
        DirectEngine(rig.reader, threads=1, chunk_nbytes=PAGE + 512)


def test_without_direct_reads_the_readers_own_way_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(PAGE))

    def refuse(_index: int, direct: bool) -> int:
        if direct:
            raise OSError(22, "Invalid argument")
        return os.open(path, os.O_RDONLY)

    with pytest.warns(SlowReadWarning):
        reader = ShardReader([path], refuse)
    engine = make_engine(reader, threads=1, chunk_nbytes=PAGE)
    assert isinstance(engine, ReadEngine)
    engine.close()


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_chunks_are_served_in_the_order_of_the_other_engine(seed: int) -> None:
    chance = random.Random(seed)
    shard = random_bytes(SHARD_PAGES * PAGE, seed=1)
    readers = MemoryReader(shard), FileReader(shard)
    plain = ScheduledEngine(readers[0].as_shard_reader(), threads=1, chunk_nbytes=PAGE, chance=random.Random(0))
    compiled = ScheduledDirectEngine(readers[1], threads=1, chunk_nbytes=PAGE, chance=random.Random(0))
    engines: tuple[Any, Any] = (plain, compiled)
    for engine in engines:
        engine.some_turns = lambda most=6: None
    pairs: list[list[Any]] = []
    free = list(range(0, SHARD_PAGES, 4))
    for _ in range(30):
        action = chance.choice(["submit", "submit", "promote", "cancel", "drain"])
        if action == "submit" and free:
            page, pages, urgency = free.pop(), chance.randint(1, 4), chance.choice(list(Urgency))
            pairs.append(
                [
                    engine.submit(reader.request(page * PAGE, np.empty(pages * PAGE, np.uint8)), urgency)
                    for engine, reader in zip(engines, readers, strict=True)
                ]
            )
        elif action == "drain" and chance.random() < 0.3:
            for engine in engines:
                while engine.turn():
                    pass
        elif action in ("promote", "cancel") and pairs:
            chosen = chance.choice(pairs)
            for engine, ticket in zip(engines, chosen, strict=True):
                getattr(engine, action)(ticket)
    for engine in engines:
        while engine.turn():
            pass
    served = [offset + chunk * PAGE for offset, chunk in compiled.served]
    assert served == [offset for offset, _ in readers[0].calls]
    for one, other in pairs:
        assert (one.finished, one.succeeded, one.cancelled) == (other.finished, other.succeeded, other.cancelled)
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("most_soon", [None, 1, 2])
@pytest.mark.parametrize("first", ["nothing", "now", "soon"])
def test_what_is_only_wanted_soon_is_not_read_beside_what_is_needed_now(most_soon: int | None, first: str) -> None:
    engine = DirectEngine(FileReader(random_bytes(PAGE, 0)), threads=3, chunk_nbytes=PAGE, most_soon=most_soon)  # type: ignore[arg-type]
    engine._start = lambda: None  # type: ignore[method-assign]
    words, state = engine._queue.words, engine._queue.address
    out = np.empty(PAGE, np.uint8)

    def submit(urgency: Urgency) -> DirectTicket:
        return engine.submit(ReadRequest(0, 0, memoryview(out), None, "one"), urgency)  # type: ignore[arg-type]

    if first != "nothing":
        submit({"now": Urgency.NOW, "soon": Urgency.SOON}[first])
    for reading in range(4):
        for soon in range(reading + 1):
            words[kernel.READING], words[kernel.READING + 1] = reading, soon
            allowed = most_soon is None or (reading == soon < most_soon)
            expected = {"nothing": -1, "now": 0, "soon": 1 if allowed else -1}[first] if reading < 3 else -1
            assert list_in_turn(state) == expected
    words[kernel.READING : kernel.READING + 2] = 0
    engine.cancel_all()
    engine.close()


def test_what_is_not_needed_now_is_checked_by_another_while_there_is_more_to_read() -> None:
    data = random_bytes(4 * PAGE, 0)
    engine = DirectEngine(FileReader(data), threads=1, chunk_nbytes=PAGE, most_soon=1)  # type: ignore[arg-type]
    engine._start = lambda: None  # type: ignore[method-assign]
    state, outs = engine._queue.address, [np.zeros(PAGE, np.uint8) for _ in range(4)]

    def submit(page: int, urgency: Urgency) -> DirectTicket:
        request = ReadRequest(0, page * PAGE, memoryview(outs[page]), None, "one")  # type: ignore[arg-type]
        return engine.submit(request, urgency)

    def read_one() -> bool:
        """Whether the bundle that was read was handed over; where not it is checked."""
        urgency = steps.list_in_turn(state)
        address, chunk = steps.begin(state, urgency)
        assert steps.note_read(state, address, urgency, steps.read(state, address, chunk))
        handed_over = bool(steps.hand_over(state, address))
        if not handed_over:
            assert steps.leave(state, address, steps.is_right(address)) == 0
        return handed_over

    tickets = [submit(page, urgency) for page, urgency in enumerate([Urgency.SOON] * 3 + [Urgency.NOW])]
    # Needed now: checked at once, though there is more to read.
    assert not read_one() and tickets[3].finished
    assert read_one() and not tickets[0].finished
    # It became urgent while it was read: whoever waits for it waits for nobody to wake.
    urgency = steps.list_in_turn(state)
    address, chunk = steps.begin(state, urgency)
    engine.promote(tickets[1])
    assert steps.note_read(state, address, urgency, steps.read(state, address, chunk))
    assert not steps.hand_over(state, address)
    assert steps.leave(state, address, steps.is_right(address)) == 0
    assert tickets[1].succeeded and not tickets[0].finished
    # Nothing more to read: who read it checks it.
    assert not read_one() and tickets[2].succeeded
    unchecked = steps.take_unchecked(state)
    assert steps.leave(state, unchecked, steps.is_right(unchecked)) == 0
    assert steps.take_unchecked(state) == 0 and all(ticket.succeeded for ticket in tickets)
    for page, out in enumerate(outs):
        assert np.array_equal(out, data[page * PAGE : (page + 1) * PAGE])
    engine.close()


# --- cancellation and faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_memory_is_left_alone_once_its_ticket_is_finished(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    rig = Rig(tmp_path, threads=chance.randint(1, 4), chunk_pages=chance.randint(1, 2))
    tickets: list[tuple[DirectTicket, Bytes, int, bool]] = []
    cancelled: set[int] = set()
    reused: set[int] = set()
    for _ in range(150):
        action = chance.choice(["submit", "submit", "cancel", "promote", "wait"])
        if action == "submit":
            page, wrong = chance.randrange(SHARD_PAGES - 5), chance.random() < 0.1
            ticket, out = rig.submit(page, chance.randint(1, 5), chance.choice(list(Urgency)), int(wrong))
            tickets.append((ticket, out, page, wrong))
        elif tickets:
            number = chance.randrange(len(tickets))
            if action == "cancel":
                cancelled.add(number)
                rig.engine.cancel(tickets[number][0])
            elif action == "promote":
                rig.engine.promote(tickets[number][0])
            else:
                rig.engine.wait_any([ticket for ticket, *_ in tickets[number:]])
        for number, (ticket, out, page, wrong) in enumerate(tickets):
            if ticket.finished and number not in reused:
                if ticket.succeeded:
                    assert not wrong
                    assert rig.holds(out, page)
                else:
                    assert number in cancelled or (wrong and isinstance(ticket.error, StoreCorruptError))
                reused.add(number)
                out[:] = number % 251
    rig.engine.wait_all([ticket for ticket, *_ in tickets])
    for number, (ticket, out, page, _) in enumerate(tickets):
        if number in reused:
            assert (out == number % 251).all(), "memory was written after its ticket was finished"
        elif ticket.succeeded:
            assert rig.holds(out, page)
    assert not rig.engine._queue.unfinished
    assert rig.engine._queue.words[kernel.READING] == rig.engine._queue.words[kernel.BUSY] == 0
    rig.engine.close()


def test_a_flip_on_the_disk_is_reported(rig: Rig) -> None:
    ticket, _ = rig.read(3, 2, wrong=1)
    assert not ticket.succeeded
    with pytest.raises(StoreCorruptError, match=rf"expert at 3 in .*shard-0 at byte {3 * PAGE}.*checksum.*store rm"):
        raise ticket.error  # type: ignore[misc]
    assert rig.read(3, 2)[0].succeeded


def test_a_flip_on_the_way_is_healed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rig.data.copy()
    spoilt = rig.data.copy()
    spoilt[5 * PAGE + 100] ^= 1
    rig.path.write_bytes(spoilt.tobytes())
    calls = []

    def read(_shard: int, offset: int, out: memoryview) -> None:
        calls.append((offset, len(out)))
        out[:] = right[offset : offset + len(out)].data

    monkeypatch.setattr(rig.reader, "read", read)
    ticket, out = rig.read(4, 3)
    assert ticket.succeeded
    assert rig.holds(out, 4)
    assert calls == [(4 * PAGE, 3 * PAGE)], "read once more, as a whole"


def test_a_shard_that_ends_early_is_reported(rig: Rig) -> None:
    os.truncate(rig.path, 6 * PAGE)
    ticket, _ = rig.read(4, 3)
    with pytest.raises(StoreCorruptError, match=f"ends at byte {6 * PAGE}"):
        raise ticket.error  # type: ignore[misc]
    assert rig.read(4, 2)[0].succeeded


def test_a_read_that_fails_is_tried_as_the_reader_does(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.reader, "direct_fd", lambda _shard: -1)
    ticket, out = rig.read(7, 3)
    assert ticket.succeeded
    assert rig.holds(out, 7)


# --- closing, collection and forks -----------------------------------------------------------------------------------


def test_a_closed_engine_takes_nothing_and_closes_again(rig: Rig) -> None:
    tickets = [rig.submit(page)[0] for page in range(20)]
    rig.engine.close()
    assert all(ticket.finished for ticket in tickets)
    rig.engine.close()
    with pytest.raises(ClosedError):
        rig.submit(1)
    rig.engine.cancel_all()


def test_an_engine_that_is_dropped_ends_its_threads(tmp_path: Path) -> None:
    rig = Rig(tmp_path, threads=3)
    rig.read(0)
    queue = rig.engine._queue
    closed = threading.Event()
    close = queue.reader.close

    def close_and_tell() -> None:
        close()
        closed.set()

    queue.reader.close = close_and_tell  # type: ignore[method-assign]
    del rig
    gc.collect()
    for thread in queue.threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert closed.wait(PATIENCE_S)


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_the_system_refuses(rig: Rig, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch, after=started)
    if not started:
        with pytest.raises(RuntimeError, match="can't start"):
            rig.submit(0)
        monkeypatch.undo()
    ticket, out = rig.read(7, 3)
    assert ticket.succeeded
    assert rig.holds(out, 7)
    assert len(rig.engine._queue.threads) == (started or 3)


def _read_some(rig: Rig) -> None:
    for page in range(12):
        ticket, out = rig.read(page)
        assert ticket.succeeded
        assert rig.holds(out, page)


def test_a_childs_child_reads_too(rig: Rig) -> None:
    _read_some(rig)

    def child() -> None:
        _read_some(rig)
        assert exit_code_of(lambda: _read_some(rig)) == 0
        _read_some(rig)
        rig.engine.close()

    assert exit_code_of(child) == 0
    _read_some(rig)


def test_a_fork_waits_for_reads_and_cancels_queued_ones_in_the_child(rig: Rig) -> None:
    for _ in range(8):
        tickets = [rig.submit(page, 4) for page in range(50)]

        def child(tickets: list[tuple[DirectTicket, Bytes]] = tickets) -> None:
            for page, (ticket, out) in enumerate(tickets):
                assert ticket.finished
                assert not ticket.succeeded or rig.holds(out, page)
            assert not rig.engine._queue.unfinished
            _read_some(rig)

        assert exit_code_of(child) == 0
        rig.engine.wait_all([ticket for ticket, _ in tickets])
        assert all(ticket.succeeded and rig.holds(out, page) for page, (ticket, out) in enumerate(tickets))


def test_a_fork_waits_for_what_python_reads_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    read, hold, begun, may_go_on = rig.reader.read, rig.engine.hold, threading.Event(), threading.Event()

    def wait_and_read(shard: int, offset: int, out: memoryview) -> None:
        begun.set()
        assert may_go_on.wait(PATIENCE_S)
        read(shard, offset, out)

    def tell_and_hold() -> None:
        may_go_on.set()
        hold()

    monkeypatch.setattr(rig.reader, "read", wait_and_read)
    monkeypatch.setattr(rig.engine, "hold", tell_and_hold)
    ticket, _ = rig.submit(3, 2, wrong=1)
    assert begun.wait(PATIENCE_S)

    def child() -> None:
        assert ticket.finished
        _read_some(rig)

    assert exit_code_of(child) == 0
    rig.engine.wait_all([ticket])
    assert isinstance(ticket.error, StoreCorruptError)


def test_forks_while_another_thread_reads(rig: Rig) -> None:
    fork_beside(lambda: _read_some(rig))
