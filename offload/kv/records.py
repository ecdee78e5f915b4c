"""What is known of each block of a pool, by its number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

_FIRST_COUNT = 1024


class BlockRecords:
    """Arrays over block numbers, which grow: they are to be asked for, not kept.

    Attributes:
        addresses: int64, in whatever memory the block is; 0 where it is on disk only, or free.
        is_above: bool: in an accelerator's memory.
        offsets: int64: where in the file, -1 where it is not.
        refs: int32, references.
        checksums: uint64, of blocks on disk.
        sizes: int64, bytes.
        owners: int64, number of the one sequence of one layer that it was made for.
        serials: int64, how often the number was used before.
        free: numbers that are not used.
        version: another one whenever a block comes, goes or moves.
    """

    def __init__(self) -> None:
        self.addresses = np.zeros(0, np.int64)
        self.is_above = np.zeros(0, np.bool_)
        self.offsets = np.zeros(0, np.int64)
        self.refs = np.zeros(0, np.int32)
        self.checksums = np.zeros(0, np.uint64)
        self.sizes = np.zeros(0, np.int64)
        self.owners = np.zeros(0, np.int64)
        self.serials = np.zeros(0, np.int64)
        self.free: list[int] = []
        self.version = 0
        self._grow(_FIRST_COUNT)

    def _grow(self, count: int) -> None:
        old = len(self.refs)
        for name in ("addresses", "is_above", "offsets", "refs", "checksums", "sizes", "owners", "serials"):
            array = np.zeros(count, getattr(self, name).dtype)
            array[:old] = getattr(self, name)
            setattr(self, name, array)
        self.offsets[old:] = -1
        self.free.extend(reversed(range(old, count)))

    def take(self, address: int, nbytes: int, owner: int, *, is_above: bool) -> int:
        """The number of a new block, with one reference."""
        if not self.free:
            self._grow(2 * len(self.refs))
        block = self.free.pop()
        self.version += 1
        self.addresses[block], self.is_above[block], self.offsets[block] = address, is_above, -1
        self.sizes[block], self.owners[block], self.refs[block] = nbytes, owner, 1
        return block

    def give(self, block: int) -> None:
        """Forget a block, whose memory and place in the file were given back."""
        self.version += 1
        self.addresses[block], self.is_above[block], self.offsets[block] = 0, False, -1
        self.serials[block] += 1
        self.free.append(block)

    def move(self, block: int, address: int) -> None:
        """A block is at another address of host memory now, or on disk only, which is 0."""
        self.version += 1
        self.addresses[block], self.is_above[block] = address, False

    def is_current(self, block: int, serial: int) -> bool:
        """Whether a block is still the one that had this serial, and referred to."""
        return bool(self.serials[block] == serial and self.refs[block] > 0)
