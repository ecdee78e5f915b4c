"""An arena: fixed-size slots cut from a few large slabs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from formats.bundle import BUNDLE_ALIGNMENT_BYTES
from offload.devices.base import Device, Slab, Span


class Arena:
    """`count` slots of `slot_nbytes` bytes; no slot crosses a slab. Slots are numbered from 0.

    Invariant: slots start page-aligned, so that O_DIRECT reads into them and their pages can be given back.
    """

    def __init__(self, device: Device, slot_nbytes: int, count: int) -> None:
        if slot_nbytes <= 0 or slot_nbytes % BUNDLE_ALIGNMENT_BYTES or count < 0:
            raise ValueError(f"an arena of {count} slots of {slot_nbytes} bytes: slots are whole pages")
        self.slot_nbytes = slot_nbytes
        self.count = count
        self._slots_per_slab = max(1, device.slab_nbytes // slot_nbytes)
        self._slabs: list[Slab] = []
        for first in range(0, count, self._slots_per_slab):
            slots = min(self._slots_per_slab, count - first)
            self._slabs.append(device.allocate(slots * slot_nbytes))
        self._addresses = [slab.address + offset for slab, offset in map(self._place, range(count))]

    def _place(self, slot: int) -> tuple[Slab, int]:
        if not 0 <= slot < self.count:
            raise IndexError(f"slot {slot} of an arena of {self.count}")
        slab, index = divmod(slot, self._slots_per_slab)
        return self._slabs[slab], index * self.slot_nbytes

    def address(self, slot: int) -> int:
        """Address of the slot's first byte."""
        if not 0 <= slot < self.count:
            raise IndexError(f"slot {slot} of an arena of {self.count}")
        return self._addresses[slot]

    def view(self, slot: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The first `nbytes` bytes of a slot, uint8 [nbytes], writable, no copy."""
        if not 0 <= nbytes <= self.slot_nbytes:
            raise ValueError(f"{nbytes} bytes of a slot of {self.slot_nbytes}")
        slab, offset = self._place(slot)
        return slab.bytes()[offset : offset + nbytes]

    def span(self, slot: int, nbytes: int) -> Span:
        """The first `nbytes` bytes of a slot as readers take them, on whichever device they are."""
        if not 0 <= nbytes <= self.slot_nbytes:
            raise ValueError(f"{nbytes} bytes of a slot of {self.slot_nbytes}")
        slab, offset = self._place(slot)
        return slab.span(offset, nbytes)

    def discard(self, slot: int) -> None:
        """Give the slot's memory back to the system; the slot can be used again later."""
        slab, offset = self._place(slot)
        slab.discard(offset, self.slot_nbytes)

    def slots_beside(self, slot: int) -> range:
        """All slots of the slab that has this one, whose memory can be given back together."""
        first = slot // self._slots_per_slab * self._slots_per_slab
        return range(first, min(first + self._slots_per_slab, self.count))

    def discard_slab(self, slot: int) -> None:
        """Give back the memory of the whole slab that has this slot."""
        slab, _ = self._place(slot)
        slab.discard(0, slab.nbytes)

    def discard_all(self) -> None:
        """Give all memory back."""
        for slab in self._slabs:
            slab.discard(0, slab.nbytes)
