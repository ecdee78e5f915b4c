"""Slots of an accelerator's memory against a plain model of which bytes are whose."""

from __future__ import annotations

import random

import pytest

from offload.devices.host import HostDevice
from offload.kv.chunked_slots import ChunkedSlots

PAGE = 4096


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pages", [7, 40, 200])
def test_slots_never_overlap_and_all_memory_comes_back(pages: int, seed: int) -> None:
    chance = random.Random(seed)
    slab = HostDevice().allocate(pages * PAGE)
    sizes = [PAGE, 2 * PAGE, 3 * PAGE]
    slots = ChunkedSlots(slab, max(sizes))
    taken: dict[int, int] = {}
    owner: dict[int, int] = {}
    refused = 0
    for _ in range(800):
        if chance.random() < 0.6:
            nbytes = chance.choice(sizes)
            address = slots.take(nbytes)
            if address is None:
                refused += 1
                continue
            assert slab.address <= address and address + nbytes <= slab.address + slab.nbytes
            for page in range(address, address + nbytes, PAGE):
                assert page not in owner, "two slots share a page"
                owner[page] = address
            taken[address] = nbytes
        elif taken:
            address = chance.choice(list(taken))
            nbytes = taken.pop(address)
            slots.give(address, nbytes)
            for page in range(address, address + nbytes, PAGE):
                del owner[page]
        assert slots.used_nbytes == sum(taken.values())
    assert refused, "the memory was never used up: the test shows nothing"
    for address, nbytes in taken.items():
        slots.give(address, nbytes)
    assert slots.used_nbytes == 0
    # Whatever it was used for before, the whole of it now serves one size.
    count = 0
    while slots.take(sizes[-1]) is not None:
        count += 1
    assert pages // 3 - 8 < count <= pages // 3, "more than a chunk is lost"


def test_a_slot_larger_than_a_chunk_is_refused() -> None:
    slots = ChunkedSlots(HostDevice().allocate(8 * PAGE), PAGE)
    assert slots.take(3 * PAGE) is None
    assert slots.take(2 * PAGE) is not None
