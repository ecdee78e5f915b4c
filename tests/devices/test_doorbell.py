"""Requests and answers over the doorbell: seeded interleavings of both sides, and real threads, with faults."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cpu_kernels import doorbell_kernel as kernel
from cpu_kernels.threads import ThreadPool
from offload.devices.doorbell import DoorbellServer, why_not_served
from offload.devices.host import HostDevice
from offload.devices.mailbox import Mailbox, MailboxLayout, collect, ring
from offload.errors import ClosedError, DoorbellError, StorageError
from offload.moe.layer import ExpertsLayer
from tests.devices.emulated_stream import SteppedStream, ThreadedStream, poisoned
from tests.moe.rig import Rig

SCHEDULES = 1000
LAYERS = 2
TOKENS, TOP_K = 2, 3


class Bench:
    """A server over a rig's layers, with homes that change from step to step."""

    def __init__(self, pool: ThreadPool, *, spin_us: float = 5.0, format: str = "fp32") -> None:
        self.rig = Rig(layers=LAYERS, format=format)
        rig = self.rig
        self.store = HostDevice().allocate(len(rig.reader.shard))
        self.store.bytes()[: len(rig.reader.shard)] = rig.reader.shard
        layout = MailboxLayout(TOKENS, TOP_K, rig.layout.hidden, rig.dtype)
        self.memory = HostDevice().allocate(layout.nbytes)
        self.box = Mailbox(layout, self.memory.bytes())
        self.fetched: list[int] = []
        self.failing = False
        self.server = DoorbellServer(self.box, rig.layers, pool, self.fetch, spin_us=spin_us, nap_us=10)
        self.expected: list[torch.Tensor] = []
        self.found: list[torch.Tensor] = []

    def address(self, layer: int, expert: int) -> int:
        return self.store.address + (layer * self.rig.count + expert) * self.rig.layout.nbytes

    def fetch(self, layer: int, experts: list[int]) -> None:
        if self.failing:
            raise StorageError("no such sector")
        for expert in experts:
            self.fetched.append(expert)
            self.server.homes[layer][expert] = self.address(layer, expert)

    def settle(self, choose: random.Random, *, nowhere: bool = True) -> None:
        """Give every expert a home."""
        for layer in range(LAYERS):
            for expert in range(self.rig.count):
                homes = [kernel.ELSEWHERE, self.address(layer, expert), kernel.NOWHERE][: 2 + nowhere]
                self.server.homes[layer][expert] = choose.choice(homes)

    def step(self, stream: SteppedStream, choose: random.Random) -> None:
        """Put a step of all layers on a stream; some pairs are nobody's."""
        self.found, self.expected = [], []
        self.server.announce(LAYERS)
        for layer in range(LAYERS):
            hidden, ids, weights = self.rig.inputs(TOKENS, TOP_K, seed=choose.getrandbits(30))
            if choose.random() < 0.3:
                ids[0, 0] = kernel.UNROUTED
            here = ids.ge(0) & torch.from_numpy(self.server.homes[layer] != kernel.ELSEWHERE)[ids.clamp(min=0)]
            chosen = torch.where(here, ids, kernel.UNROUTED)
            self.expected.append(self.rig.reference(layer, hidden, chosen, weights))
            sums = poisoned((TOKENS, self.rig.layout.hidden))
            self.found.append(sums)
            ring(stream, self.box, layer, hidden, ids, weights.float())
            collect(stream, self.box, layer, sums)
            # What a next request would do to an answer that is still read.
            stream.call(lambda: self.box.hidden.fill_(torch.nan))

    def assert_sums(self) -> None:
        for found, expected in zip(self.found, self.expected, strict=True):
            self.rig.assert_close(found.to(self.rig.dtype), expected)

    def close(self) -> None:
        self.server.close()
        self.rig.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(2) as pool:
        yield pool


@pytest.fixture
def bench(pool: ThreadPool) -> Iterator[Bench]:
    bench = Bench(pool)
    yield bench
    bench.close()


def interleave(bench: Bench, stream: SteppedStream, choose: random.Random) -> None:
    """Both sides, one operation at a time, in an order that is drawn; every draw has odds of its own."""
    odds = choose.uniform(0.05, 0.95)
    turn: Iterator[str] | None = None
    idle = 0
    while stream.operations or turn is not None:
        if choose.random() < odds:
            idle = 0 if stream.step() else idle + 1
        elif turn is None:
            turn = bench.server.serve_turn()
            idle += 1
        elif next(turn, None) is None:
            turn = None
        else:
            idle = 0
        assert idle < 10_000, "nothing goes on"


def test_a_thousand_interleavings(bench: Bench) -> None:
    """Single steps of the very code that the server's thread runs; homes change, fetches fail, ids are wrong."""
    outcomes = {"fine": 0, "fetched": 0, "failed": 0, "refused": 0}
    for seed in range(SCHEDULES):
        choose, stream = random.Random(seed), SteppedStream()
        bench.settle(choose)
        bench.failing = choose.random() < 0.1
        fetched = len(bench.fetched)
        bench.step(stream, choose)
        wrong = choose.random() < 0.05
        if wrong:
            bench.server.announce(1)
            bad = torch.full((TOKENS, TOP_K), bench.rig.count)
            ring(stream, bench.box, 0, torch.zeros_like(bench.box.hidden), bad, torch.ones(TOKENS, TOP_K))
            collect(stream, bench.box, 0, torch.empty_like(bench.box.sums))
        interleave(bench, stream, choose)
        try:
            bench.server.check()
        except StorageError:
            outcomes["failed"] += 1
            assert bench.failing
            assert any(found.isnan().all() for found in bench.found)
        except DoorbellError:
            outcomes["refused"] += 1
            assert wrong
            bench.assert_sums()
        else:
            outcomes["fine"] += 1
            outcomes["fetched"] += len(bench.fetched) > fetched
            assert not wrong
            bench.assert_sums()
        assert kernel.expected(bench.server._address) == 0
    assert all(count >= 30 for count in outcomes.values()), outcomes


@pytest.mark.parametrize("spin_us", [0.0, 300.0], ids=["sleeps at once", "spins"])
@pytest.mark.parametrize("most_pause_s", [0.0, 2e-3], ids=["at once", "with pauses"])
def test_real_threads(spin_us: float, most_pause_s: float, pool: ThreadPool) -> None:
    bench = Bench(pool, spin_us=spin_us)
    bench.server.start()
    for seed in range(40):
        choose, stream = random.Random(seed), ThreadedStream(seed, most_pause_s)
        bench.settle(choose)
        bench.failing = seed % 10 == 9
        bench.step(stream, choose)
        stream.run()
        try:
            bench.server.check()
        except StorageError:
            assert bench.failing
        else:
            bench.assert_sums()
    assert bench.fetched
    bench.close()


@pytest.mark.parametrize("format", ["bf16"])
def test_other_dtypes(format: str, pool: ThreadPool) -> None:
    bench = Bench(pool, format=format)
    with bench.server:
        for seed in range(3):
            choose, stream = random.Random(seed), ThreadedStream(seed, 0.0)
            bench.settle(choose)
            bench.step(stream, choose)
            stream.run()
            bench.server.check()
            bench.assert_sums()
    bench.close()


def test_sums_have_the_bits_of_the_step_on_the_cpu(bench: Bench) -> None:
    """With every expert in host memory."""
    choose, stream = random.Random(1), SteppedStream()
    for layer, homes in enumerate(bench.server.homes):
        homes[:] = [bench.address(layer, expert) for expert in range(bench.rig.count)]
    hidden, ids, weights = bench.rig.inputs(TOKENS, TOP_K)
    sums = poisoned((TOKENS, bench.rig.layout.hidden))
    bench.server.announce(1)
    ring(stream, bench.box, 1, hidden, ids, weights)
    collect(stream, bench.box, 1, sums)
    interleave(bench, stream, choose)
    assert torch.equal(sums, bench.rig.step(1, hidden, ids, weights))


def test_a_layer_that_there_is_not_is_answered(bench: Bench) -> None:
    stream = SteppedStream()
    sums = torch.zeros(TOKENS, bench.rig.layout.hidden)
    bench.server.announce(1)
    ring(stream, bench.box, LAYERS, *bench.rig.inputs(TOKENS, TOP_K))
    collect(stream, bench.box, LAYERS, sums)
    interleave(bench, stream, random.Random(0))
    assert sums.isnan().all()
    with pytest.raises(DoorbellError, match="there is not"):
        bench.server.check()
    bench.server.check()


def test_a_fetch_that_brings_nothing_ends_in_an_error(bench: Bench) -> None:
    choose, stream = random.Random(0), SteppedStream()
    bench.server._fetch = lambda _layer, _experts: None
    for homes in bench.server.homes:
        homes[:] = kernel.NOWHERE
    bench.step(stream, choose)
    interleave(bench, stream, choose)
    with pytest.raises(DoorbellError, match="fetched and are nowhere"):
        bench.server.check()


def test_a_stream_gets_through_when_the_server_is_closed_under_it(bench: Bench) -> None:
    bench.server.start()
    choose, stream = random.Random(0), ThreadedStream(0, 0.0)
    bench.settle(choose, nowhere=False)
    bench.step(stream, choose)
    stream.operations.insert(5, ("call", lambda: kernel.stop(bench.server._address) is None))
    stream.run()
    bench.server.close()
    with pytest.raises(DoorbellError, match="closed under it"):
        bench.server.check()
    with pytest.raises(ClosedError):
        bench.server.announce(1)


def test_a_step_that_ends_early_leaves_nothing_announced(bench: Bench) -> None:
    bench.server.announce(5)
    bench.server.check()
    assert kernel.expected(bench.server._address) == 0


def test_what_cannot_be_served_is_said(pool: ThreadPool) -> None:
    rig = Rig(kind="unknown")
    assert "known to its own module" in str(why_not_served(rig.layers[0]))
    layout = MailboxLayout(1, 1, rig.layout.hidden, rig.dtype)
    box = Mailbox(layout, HostDevice().allocate(layout.nbytes).bytes())
    with pytest.raises(ValueError, match="known to its own module"):
        DoorbellServer(box, rig.layers, pool, lambda *_: None)
    plain = Rig(hidden=32)
    with pytest.raises(ValueError, match="the mailbox is for"):
        DoorbellServer(box, plain.layers, pool, lambda *_: None)
    with pytest.raises(ValueError, match="a mailbox takes"):
        Mailbox(layout, np.zeros(64, np.uint8))
    for one in (rig, plain):
        one.close()
    assert isinstance(rig.layers[0], ExpertsLayer)
