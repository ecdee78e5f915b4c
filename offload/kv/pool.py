"""Blocks of all caches of one model: which are in memory, which on disk, and which leave next."""

from __future__ import annotations

import heapq
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from offload.devices.base import Device
from offload.errors import ClosedError, DoesNotFitError, UnsupportedOperationError
from offload.kv.held import Held
from offload.kv.slots import RamSlots
from offload.kv.sparsity.counters import SparsityCounters
from offload.kv.spill_file import SpillFile
from offload.kv.staging import Staging
from offload.kv.write_back import WriteBack, WriteJob

WRITER_THREADS = 2
AHEAD_BLOCKS = 16
"""Blocks that are written before their memory is needed."""


@dataclass
class PoolCounters:
    """Counted since the start.

    Attributes:
        blocks_written: blocks handed to the writers.
        blocks_read: blocks read back.
        write_stall_s: seconds that the model waited for memory of blocks that were being written.
        paged_steps: attention calls of layers that computed where blocks lie.
        gathered_steps: attention calls that had to have a layer's keys and values as plain tensors.
        gathered: why, by model class.
        sparsity: what attention to a part of tables did.
    """

    blocks_written: int = 0
    blocks_read: int = 0
    write_stall_s: float = 0.0
    paged_steps: int = 0
    gathered_steps: int = 0
    gathered: set[str] = field(default_factory=set)
    sparsity: SparsityCounters = field(default_factory=SparsityCounters)


class BlockPool:
    """Hands out blocks by number. The caller holds `lock` while it uses a block's memory: blocks leave only when
    others are made, which takes the lock too.

    A block is open (its owner writes to it), sealed (it stays as it is and may leave memory, the oldest tokens
    first), or on disk. Sequences share blocks; `refs` counts them.

    Attributes:
        lock: see above.
        addresses: int64, by block; 0 where a block is on disk only.
        offsets: int64, by block: where in the file, -1 where it is not.
        refs: int32, by block.
        checksums: uint64, by block on disk.
        sizes: int64, bytes, by block.
        staging: memory for blocks that are read back.
        counters: see `PoolCounters`.
        abandoned: blocks of tables that are gone; released when memory is next asked for, because a garbage
            collection that happens in the middle of a change must not make another.
    """

    def __init__(self, device: Device, ram_nbytes: int, file: SpillFile) -> None:
        """An empty pool.

        Args:
            device: whose memory.
            ram_nbytes: bound on the memory of all blocks, those included that are read back.
            file: where blocks go; the pool's to close.
        """
        self.lock = threading.RLock()
        self.ram_nbytes = ram_nbytes
        self.slots = RamSlots(device, ram_nbytes)
        self.file = file
        self.staging = Staging(device, file.reader())
        self.counters = PoolCounters()
        self.abandoned: deque[Held] = deque()
        self._writer = WriteBack(file, WRITER_THREADS)
        self._process = os.getpid()
        self._closed = False
        self._grow(1024)

    def _grow(self, count: int) -> None:
        old = len(self.__dict__.get("refs", ()))
        for name, dtype, fill in (
            ("addresses", np.int64, 0), ("offsets", np.int64, -1), ("refs", np.int32, 0), ("checksums", np.uint64, 0),
            ("sizes", np.int64, 0), ("_owners", np.int64, 0), ("_serials", np.int64, 0),
        ):  # fmt: skip
            array = np.full(count, fill, dtype)
            if old:
                array[:old] = getattr(self, name)
            setattr(self, name, array)
        if not old:
            self._free_ids: list[int] = []
            self._sealed: list[tuple[int, int, int, int]] = []
            self._leaving: deque[int] = deque()
            self._jobs: dict[int, WriteJob] = {}
        self._free_ids.extend(reversed(range(old, count)))

    _segment_blocks: int
    addresses: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    refs: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    _owners: npt.NDArray[np.int64]
    _serials: npt.NDArray[np.int64]

    def stage(self, segment_blocks: int, nbytes: int, segments: int) -> None:
        """See that segments of some size can be read back: `segments` of them if they take no more than a quarter of
        the memory, at least two.

        Args:
            segment_blocks: blocks of a segment, the same in every call.
            nbytes: of a block.
            segments: to be on their way at once.
        """
        with self.lock:
            self._segment_blocks = segment_blocks
            segment = segment_blocks * nbytes
            wanted = max(2 * segment, min(segments * segment, self.ram_nbytes // 4))
            if wanted > self.staging.budget_nbytes:
                self.staging.budget_nbytes = wanted
                self.slots.shrink(max(0, self.ram_nbytes - wanted))

    # --- blocks ------------------------------------------------------------------------------------------------

    def new(self, nbytes: int, owner: int) -> int:
        """An open block with one reference; its bytes are whatever was there. The caller holds the lock.

        Args:
            nbytes: of the block, whole pages.
            owner: number of one sequence of one layer.

        Raises:
            DoesNotFitError: open blocks alone take the budget.
            StorageError: a block that had to leave cannot be written.
        """
        self.release_abandoned()
        address = self._slot(nbytes)
        if not self._free_ids:
            self._grow(2 * len(self.refs))
        block = self._free_ids.pop()
        self.addresses[block], self.offsets[block], self.sizes[block] = address, -1, nbytes
        self.refs[block], self._owners[block] = 1, owner
        self._write_ahead()
        return block

    def share(self, blocks: npt.NDArray[np.int64]) -> None:
        """Count one more reference for each."""
        np.add.at(self.refs, blocks, 1)

    def release(self, blocks: npt.NDArray[np.int64]) -> None:
        """Count one reference less for each; blocks without any are free."""
        np.subtract.at(self.refs, blocks, 1)
        for block in {int(one) for one in blocks[self.refs[blocks] == 0]}:
            # A block that is being written is freed when it would leave.
            if block not in self._jobs:
                self._free(block)

    def release_abandoned(self) -> None:
        """Free what tables that are gone referred to. The caller holds the lock."""
        while self.abandoned:
            self.release(self.abandoned.popleft().cut(0))

    @contextmanager
    def at_hand(self, blocks: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Within it, addresses of blocks wherever they are; those on disk are read, at most a segment of them.

        Raises:
            StorageError, StoreCorruptError: one cannot be read.
        """
        addresses = self.addresses[blocks]
        cold = blocks[addresses == 0]
        if not len(cold):
            yield addresses
            return
        key = self.key(blocks)
        if not self.start(key, blocks):
            self.staging.drop_all()
            self.start(key, blocks)
        try:
            yield self.fetch(key, blocks)
        finally:
            self.staging.drop(key)

    def key(self, blocks: npt.NDArray[np.int64]) -> bytes:
        """What names blocks on disk while they are staged: their numbers, and how often each was used before."""
        cold = blocks[self.addresses[blocks] == 0]
        return bytes(cold.tobytes() + self._serials[cold].tobytes())

    def start(self, key: bytes, blocks: npt.NDArray[np.int64]) -> bool:
        """Begin to read those of some blocks that are on disk, unless that has begun; False where there is no room.

        Args:
            key: `key(blocks)`.
            blocks: of one size, at most a segment.
        """
        if self.staging.is_started(key):
            return True
        cold = blocks[self.addresses[blocks] == 0]
        nbytes = int(self.sizes[cold[0]])
        started = self.staging.start(
            key, self.offsets[cold].tolist(), self.checksums[cold].tolist(), nbytes, self._segment_blocks * nbytes
        )
        self.counters.blocks_read += len(cold) if started else 0
        return started

    def fetch(self, key: bytes, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Wait for blocks that were started; addresses of all of them."""
        addresses = self.addresses[blocks]
        cold = np.flatnonzero(addresses == 0)
        first = self.staging.fetch(key)
        addresses[cold] = first + np.arange(len(cold)) * self.sizes[blocks[cold[0]]]
        return addresses

    def seal(self, block: int, first_token: int) -> None:
        """Let a block leave when memory is needed; lower first tokens leave first."""
        entry = (first_token, int(self._owners[block]), block, int(self._serials[block]))
        heapq.heappush(self._sealed, entry)

    def reopen(self, block: int) -> bool:
        """Take a sealed block back to write to it; False where it must be copied, for it is shared or leaving."""
        if self.refs[block] != 1 or not self.addresses[block] or block in self._jobs:
            return False
        self._serials[block] += 1
        return True

    def _free(self, block: int) -> None:
        if self.addresses[block]:
            self.slots.give(int(self.addresses[block]), int(self.sizes[block]))
            self.addresses[block] = 0
        if self.offsets[block] >= 0:
            self.file.give(int(self.offsets[block]))
            self.offsets[block] = -1
        self._serials[block] += 1
        self._free_ids.append(block)

    # --- leaving -----------------------------------------------------------------------------------------------

    def _slot(self, nbytes: int) -> int:
        while (address := self.slots.take(nbytes)) is None:
            self._evict_one(nbytes)
        return address

    def _evict_one(self, nbytes: int) -> None:
        if not self._leaving and not self._start_write():
            raise DoesNotFitError(
                f"the KV cache's share of RAM, {self.slots.budget_nbytes:,} bytes, is taken by blocks that are being "
                f"written to ({self.slots.used_nbytes:,} bytes) and has no room for one of {nbytes:,} more; give "
                "kv_ram= more, or take fewer sequences at once"
            )
        block = self._leaving.popleft()
        job = self._jobs[block]
        self._wait(job)
        if job.error is not None and self.refs[block] > 0:
            # It failed some time ago: what counts is whether the disk works now.
            job = self._jobs[block] = self._writer.submit(job.address, job.nbytes, job.offset)
            self._wait(job)
        del self._jobs[block]
        if self.refs[block] == 0:
            self._free(block)
        elif job.error is not None:
            self.file.give(int(self.offsets[block]))
            self.offsets[block] = -1
            self.seal(block, -1)
            raise job.error
        else:
            self.checksums[block] = job.checksum
            self.slots.give(int(self.addresses[block]), int(self.sizes[block]))
            self.addresses[block] = 0

    def _wait(self, job: WriteJob) -> None:
        if not job.finished:
            before = perf_counter()
            self._writer.wait(job)
            self.counters.write_stall_s += perf_counter() - before

    def _start_write(self) -> bool:
        """Hand the oldest sealed block to the writers; False where there is none."""
        while self._sealed:
            _, owner, block, serial = heapq.heappop(self._sealed)
            if serial != self._serials[block] or self.refs[block] == 0:
                continue
            size = int(self.sizes[block])
            self.offsets[block] = self.file.take(owner, size)
            self._jobs[block] = self._writer.submit(int(self.addresses[block]), size, int(self.offsets[block]))
            self._leaving.append(block)
            self.counters.blocks_written += 1
            return True
        return False

    def _write_ahead(self) -> None:
        """Where memory gets short, write the next blocks before somebody has to wait for them."""
        slots = self.slots
        if not self._sealed:
            return
        ahead = min(AHEAD_BLOCKS, len(self._sealed) // 4 + 1)
        while (
            len(self._leaving) < ahead
            and slots.budget_nbytes - slots.used_nbytes < ahead * self.sizes[self._sealed[0][2]]
            and self._start_write()
        ):
            pass

    # --- state -------------------------------------------------------------------------------------------------

    def tiers_nbytes(self) -> tuple[int, int]:
        """Bytes of blocks in memory, and of those on disk only."""
        with self.lock:
            on_disk = (self.refs > 0) & (self.addresses == 0)
            return self.slots.used_nbytes, int(self.sizes[on_disk].sum())

    def check(self) -> None:
        """Prove that slots, file space and references are accounted for.

        Raises:
            AssertionError: they are not.
        """
        with self.lock:
            free = set(self._free_ids)
            assert len(free) == len(self._free_ids), "a block is free twice"
            for block in range(len(self.refs)):
                held = self.addresses[block] != 0 or self.offsets[block] >= 0
                expected = block not in free
                assert held == expected, f"block {block}: held {held}, expected {expected}"
                assert self.refs[block] == 0 or expected, f"block {block} is free and referred to"
                assert self.refs[block] > 0 or not expected or block in self._jobs, f"block {block} leaked"
            resident = self.addresses != 0
            assert int(self.sizes[resident].sum()) == self.slots.used_nbytes, "slots are not accounted for"
            assert len(set(self.addresses[resident].tolist())) == int(resident.sum()), "two blocks in one slot"
            assert set(self._jobs) == set(self._leaving), "a block leaves that nobody writes"

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child of the process that made the pool."""
        return os.getpid() == self._process

    @contextmanager
    def use(self) -> Iterator[None]:
        """The lock, for whoever reads or writes blocks.

        Raises:
            ClosedError, UnsupportedOperationError: the pool is closed, or its process another.
        """
        if not self.is_of_this_process:
            raise UnsupportedOperationError(
                "this KV cache was made before a fork, and its blocks on disk are the parent process's; start a new one"
            )
        with self.lock:
            if self._closed:
                raise ClosedError("the model's runtime was closed; load the model again")
            yield

    def close(self) -> None:
        """Stop writers and readers, free memory and file. May be called again."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self._writer.close()
            self.staging.close()
            self.file.close()
            self.slots.release_memory()
