"""Disks between their measurements, and reads and kernels that slow each other down against playing it out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.disk import BURST_READS, FEW_READS, GOING_ON_READS, Disk, DiskPoint, Overlap

POINTS = (
    DiskPoint(1 << 16, 1, 1e8),
    DiskPoint(1 << 20, 1, 5e8),
    DiskPoint(1 << 16, 4, 4e8),
    DiskPoint(1 << 20, 4, 2e9),
)
DISK = Disk(POINTS, (), 1e-4, Overlap(1, 0.5, 0.6), Overlap(64, 0.7, 0.8), 0)


@pytest.mark.parametrize(
    ("block", "depth", "expected"),
    [
        (1 << 16, 1, 1e8),
        (1 << 12, 1, 1e8),
        (1 << 18, 1, 3e8),
        (1 << 24, 4, 2e9),
        (1 << 20, 3, 2e9),
        (1 << 20, 64, 2e9),
        (1 << 20, 0, 5e8),
    ],
)
def test_a_disk_between_its_points(block: int, depth: int, expected: float) -> None:
    assert DISK.bytes_per_s(block, depth) == pytest.approx(expected)
    assert DISK.overlapped_bytes_per_s(block, depth) == pytest.approx(expected / 2)
    assert DISK.times(3.0).bytes_per_s(block, depth) == pytest.approx(3 * expected)


def test_a_disk_without_measurements_is_refused() -> None:
    with pytest.raises(ValueError):
        Disk((), (), 1e-4, DISK.few, DISK.many, 0)
    with pytest.raises(ValueError):
        Disk(POINTS, (), 1e-4, DISK.many, DISK.few, 0)


def _startup_s(disk: Disk, nbytes: int, reads: float, rate: float = 2e9) -> float:
    return float(disk.startup_s(nbytes, np.array(reads), lambda count: count * nbytes / rate))


def test_bursts_take_longer_than_their_share() -> None:
    assert _startup_s(DISK, 1 << 20, 5.0) == DISK.latency_s
    bursts = (DiskPoint(1 << 16, 4, 2e8), DiskPoint(1 << 20, 4, 1e9))
    found = replace(DISK, bursts=bursts)
    burst_s = BURST_READS * (1 << 20) / 1e9
    for reads in (1.0, 8.0):
        assert _startup_s(found, 1 << 20, reads) + BURST_READS * (1 << 20) / 2e9 == pytest.approx(burst_s)
    assert _startup_s(found.times(2.0), 1 << 20, 8, 4e9) == pytest.approx(_startup_s(found, 1 << 20, 8) / 2)
    assert _startup_s(replace(DISK, bursts=(DiskPoint(1 << 20, 4, 3e9),)), 1 << 20, 8) == 0.0


def test_few_reads_take_what_they_were_measured_to() -> None:
    found = replace(DISK, bursts=(DiskPoint(1 << 20, 4, 1e9),), short_bursts=(DiskPoint(1 << 20, 4, 5e8),))
    few_s, burst_s = FEW_READS * (1 << 20) / 5e8, BURST_READS * (1 << 20) / 1e9
    for reads in (2.0, 3.5, 8.0):
        whole_s = _startup_s(found, 1 << 20, reads) + reads * (1 << 20) / 2e9
        assert whole_s == pytest.approx(np.interp(reads, [FEW_READS, BURST_READS], [few_s, burst_s]))
    assert _startup_s(found, 1 << 20, 1.0) == pytest.approx(_startup_s(found, 1 << 20, 2.0))
    assert _startup_s(found.times(2.0), 1 << 20, 2, 4e9) == pytest.approx(_startup_s(found, 1 << 20, 2) / 2)


def test_reads_that_go_on_have_their_start_in_their_speed() -> None:
    found = replace(DISK, bursts=(DiskPoint(1 << 20, 4, 1e9),))
    half = (BURST_READS + GOING_ON_READS) / 2
    assert _startup_s(found, 1 << 20, half) == pytest.approx(_startup_s(found, 1 << 20, 8.0) / 2)
    assert _startup_s(found, 1 << 20, GOING_ON_READS) == _startup_s(found, 1 << 20, 1e3) == 0.0


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_what_is_left_between_reads_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        replace(DISK, between=share)


@pytest.mark.parametrize(
    ("tokens", "reads", "kernels"), [(0.5, 0.5, 0.6), (1, 0.5, 0.6), (8, 0.6, 0.7), (64, 0.7, 0.8), (1e4, 0.7, 0.8)]
)
def test_what_is_left_lies_between_few_and_many_tokens(tokens: float, reads: float, kernels: float) -> None:
    found = DISK.overlap(tokens, 1e9)
    assert (found.reads, found.kernels) == pytest.approx((reads, kernels))


@pytest.mark.parametrize(("reads", "kernels"), [(0.0, 1.0), (1.0, 0.0), (1.1, 1.0), (0.4, 0.5)])
def test_what_is_no_share_is_refused(reads: float, kernels: float) -> None:
    with pytest.raises(ValueError):
        Overlap(1, reads, kernels)


@given(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 10), st.floats(0, 10))
def test_both_at_once_are_played_out(kernels: float, more: float, kernels_s: float, reads_s: float) -> None:
    reads = 1 - kernels + more * kernels
    left = {"kernels": kernels_s, "reads": reads_s}
    speeds = {"kernels": kernels, "reads": max(reads, 1e-3)}
    overlap = Overlap(1, speeds["reads"], kernels) if sum(speeds.values()) >= 1 else None
    if overlap is None:
        return
    now = 0.0
    while any(left.values()):
        working = {name: speeds[name] if all(left.values()) else 1.0 for name in left if left[name]}
        step = min(left[name] / speed for name, speed in working.items())
        now += step
        for name, speed in working.items():
            rest = left[name] - step * speed
            left[name] = rest if rest > 1e-9 else 0.0
    found = float(overlap.seconds(np.array(kernels_s), np.array(reads_s)))
    assert found == pytest.approx(now, abs=1e-6)
    assert max(kernels_s, reads_s) * (1 - 1e-9) <= found <= (kernels_s + reads_s) * (1 + 1e-9) + 1e-9


def test_bursts_may_be_slower_by_more_than_reads_that_go_on() -> None:
    known = replace(DISK, bursts=(DiskPoint(1 << 20, 4, 1e9),), short_bursts=(DiskPoint(1 << 20, 4, 5e8),))
    slower = known.times(0.5, 0.25)
    assert slower.bytes_per_s(1 << 20, 4) == 0.5 * known.bytes_per_s(1 << 20, 4)
    assert slower.burst_bytes_per_s(1 << 20) == 0.25 * known.burst_bytes_per_s(1 << 20) == 2.5e8
    assert known.times(0.5) == known.times(0.5, 0.5)
    assert replace(DISK, bursts=()).burst_bytes_per_s(1 << 20) == DISK.bytes_per_s(1 << 20, 8)


@pytest.mark.parametrize(("factor", "kernels"), [(1.0, 0.8), (0.5, 0.9), (2.0, 0.6), (3.0, 0.4), (100.0, 0.3)], ids=str)
def test_what_reads_take_of_kernels_is_by_the_byte(factor: float, kernels: float) -> None:
    found = Overlap(1, 0.7, 0.8, 2e9).beside(factor * 2e9)
    assert (found.tokens, found.reads) == (1, 0.7)
    assert found.kernels == pytest.approx(kernels)
    assert Overlap(1, 0.7, 0.8).beside(factor * 2e9) == Overlap(1, 0.7, 0.8), "of any reads"
    # Kernels that kept little when it was measured keep that.
    assert Overlap(1, 1.0, 0.05, 2e9).beside(factor * 2e9).kernels >= 0.05 * (1 - 1e-9)


def test_what_is_left_was_found_beside_reads_of_some_speed() -> None:
    """Shares are those beside reads as fast as those that were measured, whatever a probe finds of the disk."""
    known = replace(DISK, few=Overlap(1, 0.5, 0.6, 1e9), many=Overlap(64, 0.7, 0.8, 4e9))
    for disk in (known, known.times(3.0)):
        assert disk.overlap(1, 1e9).kernels == pytest.approx(0.6)
        assert disk.overlap(64, 4e9).kernels == pytest.approx(0.8)
        assert disk.overlap(1, 0.5e9).kernels == pytest.approx(0.8)
        assert disk.overlap(64, 6e9).kernels == pytest.approx(0.7)
