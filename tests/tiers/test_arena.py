"""Slots lie apart and aligned, and their memory can be given back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.devices.base import Slab
from offload.devices.host import HostDevice
from offload.tiers.arena import Arena

PAGE = 4096


class CountingDevice(HostDevice):
    def __init__(self) -> None:
        self.allocated: list[int] = []

    def allocate(self, nbytes: int) -> Slab:  # type: ignore[override]
        self.allocated.append(nbytes)
        return super().allocate(nbytes)


@settings(deadline=None)
@given(pages=st.integers(1, 9), count=st.integers(1, 40), slab_pages=st.integers(1, 30))
def test_slots_are_aligned_and_lie_apart(pages: int, count: int, slab_pages: int) -> None:
    device = CountingDevice()
    device.slab_nbytes = slab_pages * PAGE
    arena = Arena(device, pages * PAGE, count)
    starts = sorted(arena.address(slot) for slot in range(count))
    assert all(start % PAGE == 0 for start in starts)
    assert all(after - before >= pages * PAGE for before, after in itertools.pairwise(starts))
    assert sum(device.allocated) == count * pages * PAGE
    assert max(device.allocated) <= max(slab_pages, pages) * PAGE
    for slot in range(count):
        view = arena.view(slot, pages * PAGE)
        assert view.ctypes.data == arena.address(slot)
        view[:] = slot
    for slot in range(count):
        assert (arena.view(slot, pages * PAGE) == slot).all(), "a slot was overwritten by another"


@pytest.mark.parametrize(("count", "in_slab"), [(7, 3), (6, 3), (2, 5)])
def test_slots_of_one_slab(count: int, in_slab: int) -> None:
    device = CountingDevice()
    device.slab_nbytes = in_slab * PAGE
    arena = Arena(device, PAGE, count)
    for slot in range(count):
        first = slot - slot % in_slab
        assert arena.slots_beside(slot) == range(first, min(count, first + in_slab))
        arena.view(slot, PAGE)[:] = 7
    arena.discard_slab(count - 1)
    gone = arena.slots_beside(count - 1)
    assert [bool(arena.view(slot, PAGE).any()) for slot in range(count)] == [slot not in gone for slot in range(count)]
    span = arena.span(0, 16)
    assert isinstance(span, memoryview)
    assert len(span) == 16
    with pytest.raises(ValueError, match="of a slot"):
        arena.span(0, PAGE + 1)


def test_a_view_has_the_bytes_asked_for() -> None:
    arena = Arena(HostDevice(), 2 * PAGE, 3)
    assert arena.view(1, 5000).shape == (5000,)
    assert arena.view(1, 0).shape == (0,)
    for nbytes in (2 * PAGE + 1, -1):
        with pytest.raises(ValueError, match="of a slot of 8192"):
            arena.view(1, nbytes)


@pytest.mark.parametrize("slot", [-1, 3, 100])
def test_there_are_no_other_slots(slot: int) -> None:
    arena = Arena(HostDevice(), PAGE, 3)
    for use in (arena.address, arena.discard, lambda number: arena.view(number, 1)):
        with pytest.raises(IndexError, match=f"slot {slot} of an arena of 3"):
            use(slot)


@pytest.mark.parametrize(("nbytes", "count"), [(0, 1), (-PAGE, 1), (PAGE + 512, 1), (PAGE, -1)])
def test_slots_are_whole_pages(nbytes: int, count: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        Arena(HostDevice(), nbytes, count)


def test_discarding_zeroes_one_slot_only() -> None:
    arena = Arena(HostDevice(), 3 * PAGE, 4)
    for slot in range(4):
        arena.view(slot, 3 * PAGE)[:] = 7
    arena.discard(2)
    assert not arena.view(2, 3 * PAGE).any()
    assert all((arena.view(slot, 3 * PAGE) == 7).all() for slot in (0, 1, 3))
    arena.view(2, 3 * PAGE)[:] = 9
    assert (arena.view(2, 3 * PAGE) == 9).all()


def _resident_nbytes(address: int, nbytes: int) -> int:
    """Resident bytes of the mapping that holds a range, from the kernel's own account."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start < address + nbytes and end > address
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping")


def test_discarded_memory_goes_back_to_the_system() -> None:
    slot_nbytes, count = 8 << 20, 4
    arena = Arena(HostDevice(), slot_nbytes, count)
    first = min(arena.address(slot) for slot in range(count))

    def resident() -> int:
        return _resident_nbytes(first, slot_nbytes)

    untouched = resident()
    for slot in range(count):
        arena.view(slot, slot_nbytes)[:] = 1
    full = resident()
    assert full - untouched >= count * slot_nbytes
    arena.discard(1)
    assert full - resident() >= slot_nbytes - (4 << 20), "huge pages at the edges may stay"
    arena.discard_all()
    assert resident() <= untouched + (1 << 20)
    assert not any(arena.view(slot, slot_nbytes).any() for slot in range(count))


def test_memory_outlives_the_arena_while_a_view_is_held() -> None:
    arena = Arena(HostDevice(), PAGE, 2)
    view = arena.view(1, PAGE)
    view[:] = 5
    del arena
    assert np.array_equal(view, np.full(PAGE, 5, np.uint8))


def test_an_arena_of_no_slots_takes_nothing() -> None:
    arena = Arena(HostDevice(), PAGE, 0)
    arena.discard_all()
    with pytest.raises(IndexError):
        arena.address(0)
