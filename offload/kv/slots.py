"""Memory for blocks of several sizes out of one budget."""

from __future__ import annotations

import ctypes
from bisect import bisect_right

from offload.devices.base import Device, Slab

_SLAB_NBYTES = 64 << 20
PAGE_NBYTES = 4096
_SPARED_NBYTES = 2 << 20


class RamSlots:
    """Slots of whole pages, of any size, that take at most `budget_nbytes` together.

    Each size has slabs of address space of its own, which take no memory before a slot is used. A slot that is given
    back keeps its memory for the next one of its size, unless another size needs the budget.

    Attributes:
        budget_nbytes: bound on memory.
        used_nbytes: of slots that are out.
    """

    def __init__(self, device: Device, budget_nbytes: int) -> None:
        self.budget_nbytes = budget_nbytes
        self.used_nbytes = 0
        self._device = device
        self._slabs: list[Slab] = []
        self._starts: list[int] = []
        self._by_start: dict[int, Slab] = {}
        self._warm: dict[int, list[int]] = {}
        self._cold: dict[int, list[int]] = {}
        self._warm_nbytes = 0

    def take(self, nbytes: int, *, spare: bool = False) -> int | None:
        """The address of a slot, page-aligned; None where the budget is used up.

        Args:
            nbytes: a multiple of the page size.
            spare: take no memory of the last few free slots of other sizes. A slot that gives its memory back leaves
                a hole in a huge page, which is then one of small pages; where two sizes come and go in turn, there
                would be none left.
        """
        warm = self._warm.get(nbytes)
        if warm:
            self._warm_nbytes -= nbytes
        else:
            over = self.used_nbytes + self._warm_nbytes + nbytes - self.budget_nbytes
            if over > 0 and not self._discard(over, spare=spare):
                return None
            warm = self._cold.get(nbytes) or self._reserve(nbytes)
        self.used_nbytes += nbytes
        return warm.pop()

    def give(self, address: int, nbytes: int) -> None:
        """Take a slot back."""
        self.used_nbytes -= nbytes
        self._warm_nbytes += nbytes
        self._warm.setdefault(nbytes, []).append(address)

    def shrink(self, budget_nbytes: int) -> int:
        """Set another budget; returns the bytes by which slots that are out exceed it."""
        self.budget_nbytes = budget_nbytes
        self._discard(self.used_nbytes + self._warm_nbytes - budget_nbytes)
        return max(0, self.used_nbytes - budget_nbytes)

    def release_memory(self) -> None:
        """Give all memory back to the system; no slot is used any more."""
        self._slabs.clear()
        self._starts.clear()
        self._by_start.clear()
        self._warm.clear()
        self._cold.clear()
        self._warm_nbytes = self.used_nbytes = 0

    def _discard(self, nbytes: int, *, spare: bool = False) -> bool:
        """Give memory of slots that nobody uses back to the system; whether it was as much as asked."""
        spared = min(_SPARED_NBYTES, self.budget_nbytes // 16) if spare else 0
        for size, addresses in self._warm.items():
            while len(addresses) > spared // size and nbytes > 0:
                address = addresses.pop()
                start = self._starts[bisect_right(self._starts, address) - 1]
                self._by_start[start].discard(address - start, size)
                self._cold[size].append(address)
                self._warm_nbytes -= size
                nbytes -= size
        return nbytes <= 0

    def _reserve(self, nbytes: int) -> list[int]:
        count = max(1, min(_SLAB_NBYTES, self.budget_nbytes) // nbytes)
        slab = self._device.allocate(count * nbytes)
        self._slabs.append(slab)
        self._by_start[slab.address] = slab
        self._starts = sorted(self._by_start)
        cold = self._cold.setdefault(nbytes, [])
        # The lowest address is used first.
        cold.extend(slab.address + index * nbytes for index in reversed(range(count)))
        return cold


def view(address: int, nbytes: int) -> memoryview:
    """The bytes at an address, writable, no copy."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
