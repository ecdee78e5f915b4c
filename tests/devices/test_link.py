"""The modelled link: what it copies, and how long it says that takes."""

from __future__ import annotations

import numpy as np
import pytest

from offload.devices.link import Clock, Link, LinkReader, RealClock, parse_link
from offload.errors import InvalidArgumentError
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from tests.tiers.readers import random_bytes


class FakeClock(Clock):
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.slept: list[float] = []

    def now_s(self) -> float:
        return self.time_s

    def sleep_until(self, moment_s: float) -> None:
        self.slept.append(moment_s)
        self.time_s = max(self.time_s, moment_s)


def test_pieces_cross_one_after_the_other() -> None:
    clock = FakeClock()
    reader = LinkReader(Link(1000.0, 0.5), clock)
    source = random_bytes(300, seed=1)
    out = np.zeros(300, np.uint8)
    reader.read(0, source.ctypes.data, memoryview(out)[:100])
    reader.read(0, source.ctypes.data + 100, memoryview(out)[100:])
    assert np.array_equal(out, source)
    assert clock.slept == pytest.approx([100.6, 101.3])
    assert reader.bytes_read == 300


def test_a_link_that_was_idle_starts_now() -> None:
    clock = FakeClock()
    reader = LinkReader(Link(1000.0, 0.0), clock)
    out, source = np.zeros(100, np.uint8), random_bytes(100, seed=2)
    reader.read(0, source.ctypes.data, memoryview(out))
    clock.time_s = 200.0
    reader.read(0, source.ctypes.data, memoryview(out))
    assert clock.slept == pytest.approx([100.1, 200.1])


def test_an_engine_fills_slots_over_it() -> None:
    import xxhash

    source, out = random_bytes(3 * 4096, seed=3), np.zeros(3 * 4096, np.uint8)
    engine = ReadEngine(LinkReader(Link(1e9), FakeClock()), threads=1, chunk_nbytes=4096)
    request = ReadRequest(0, source.ctypes.data, memoryview(out), xxhash.xxh3_64_intdigest(source), "expert 0")  # type: ignore[arg-type]
    ticket = engine.submit(request, Urgency.NOW)
    engine.wait_all([ticket])
    engine.close()
    assert ticket.succeeded
    assert np.array_equal(out, source)


def test_seconds_of_a_copy() -> None:
    assert Link(100.0, 2.0).copy_s(250, 100) == pytest.approx(2.5 + 3 * 2.0)


def test_the_real_clock_waits_for_moments_to_come_only() -> None:
    clock = RealClock()
    now = clock.now_s()
    clock.sleep_until(now - 1)
    clock.sleep_until(now + 0.001)
    assert clock.now_s() >= now + 0.001


def test_rates() -> None:
    assert parse_link("25GB/s").bytes_per_s == 25e9
    assert parse_link(" 1.5 GiB / s ").bytes_per_s == 1.5 * 2**30
    link = Link(1.0)
    assert parse_link(link) is link
    for wrong in ("25GB", "fast", "25Gb/s", "0GB/s", "GB/s", 25, None, "1GB/s/s"):
        with pytest.raises(InvalidArgumentError, match="link"):
            parse_link(wrong)  # type: ignore[arg-type]
    for bandwidth, latency in ((0.0, 0.0), (1.0, -1.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="carries nothing"):
            Link(bandwidth, latency)
