"""Slots of several sizes in memory that an accelerator gave once and for all."""

from __future__ import annotations

from offload.devices.base import Slab
from placement.kv_settings import CHUNK_BLOCKS


class ChunkedSlots:
    """Slots of one slab, cut into chunks, each of which holds slots of one size for as long as any is out.

    Memory of an accelerator is not given back page by page, as the host's is (`RamSlots`): what one size leaves is
    another's only when a chunk is empty.

    Attributes:
        budget_nbytes: of the slab.
        used_nbytes: of slots that are out.
        chunk_nbytes: of a chunk, and of the largest slot that it can have.
    """

    def __init__(self, slab: Slab, largest_nbytes: int) -> None:
        """Cut the slab up.

        Args:
            slab: whose memory.
            largest_nbytes: of the slots that will be asked for; larger ones than a chunk are refused.
        """
        self.budget_nbytes = slab.nbytes
        self.used_nbytes = 0
        self._first = slab.address
        # At least four chunks, or as many as there can be.
        self.chunk_nbytes = largest_nbytes * max(1, min(CHUNK_BLOCKS, slab.nbytes // (4 * largest_nbytes)))
        count = slab.nbytes // self.chunk_nbytes
        # The lowest address is used first.
        self._empty = [slab.address + index * self.chunk_nbytes for index in reversed(range(count))]
        self._free: dict[int, list[int]] = {}
        self._open: dict[int, dict[int, None]] = {}

    def take(self, nbytes: int) -> int | None:
        """The address of a slot; None where there is none of this size and no empty chunk.

        Args:
            nbytes: a multiple of the page size.
        """
        chunks = self._open.setdefault(nbytes, {})
        if not chunks:
            if not self._empty or nbytes > self.chunk_nbytes:
                return None
            chunk = self._empty.pop()
            self._free[chunk] = [chunk + index * nbytes for index in reversed(range(self.chunk_nbytes // nbytes))]
            chunks[chunk] = None
        chunk = next(iter(chunks))
        slots = self._free[chunk]
        address = slots.pop()
        if not slots:
            del chunks[chunk]
        self.used_nbytes += nbytes
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Take a slot back."""
        self.used_nbytes -= nbytes
        chunk = address - (address - self._first) % self.chunk_nbytes
        slots = self._free[chunk]
        slots.append(address)
        if len(slots) == self.chunk_nbytes // nbytes:
            self._open[nbytes].pop(chunk, None)
            del self._free[chunk]
            self._empty.append(chunk)
        else:
            self._open[nbytes][chunk] = None
