"""Blocks in host memory; the oldest are written to disk, ahead of need and on other threads."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from time import perf_counter

from offload.devices.base import Device
from offload.errors import DoesNotFitError
from offload.kv.records import BlockRecords
from offload.kv.slots import RamSlots
from offload.kv.spill_file import SpillFile
from offload.kv.write_back import WriteBack, WriteJob

WRITER_THREADS = 2
AHEAD_BLOCKS = 16
"""Blocks that leave a memory before it is needed."""


class Below:
    """Slots in host memory, and what is written from them. The caller holds the pool's lock.

    Attributes:
        slots: the memory.
        file: where blocks go.
        jobs: writes under way or done, by block; the memory of these is taken when it is needed.
        leaving: their blocks, the oldest first.
        blocks_written: handed to the writers since the start.
        stall_s: seconds that the model waited for memory of blocks that were being written.
    """

    def __init__(
        self, records: BlockRecords, device: Device, ram_nbytes: int, file: SpillFile, free: Callable[[int], None]
    ) -> None:
        """An empty tier.

        Args:
            records: of all blocks.
            device: whose memory.
            ram_nbytes: bound on it.
            file: see above.
            free: what to do with a block that nobody refers to any more when it would leave.
        """
        self.slots = RamSlots(device, ram_nbytes)
        self.file = file
        self.jobs: dict[int, WriteJob] = {}
        self.leaving: deque[int] = deque()
        self.blocks_written = 0
        self.stall_s = 0.0
        self._records = records
        self._free = free
        self._writer = WriteBack(file, WRITER_THREADS)
        self._sealed: list[tuple[int, int, int, int]] = []
        self._has_evicted = False

    def seal(self, block: int, first_token: int) -> None:
        """Let a block leave when memory is needed; lower first tokens leave first."""
        owner, serial = int(self._records.owners[block]), int(self._records.serials[block])
        heapq.heappush(self._sealed, (first_token, owner, block, serial))

    def take(self, nbytes: int) -> int:
        """The address of a slot.

        Raises:
            DoesNotFitError: open blocks alone take the budget.
            StorageError: a block that had to leave cannot be written.
        """
        address = self.take_if_any(nbytes)
        if address is None:
            raise DoesNotFitError(
                f"the KV cache's share of RAM, {self.slots.budget_nbytes:,} bytes, is taken by blocks that are being "
                f"written to ({self.slots.used_nbytes:,} bytes) and has no room for one of {nbytes:,} more; give "
                "kv_ram= more, or take fewer sequences at once"
            )
        return address

    def take_if_any(self, nbytes: int) -> int | None:
        """As `take`; None where no block may leave."""
        # Before the first block leaves, all memory that is free is used.
        while (address := self.slots.take(nbytes, spare=self._has_evicted)) is None:
            if not self.leaving and not self._start_write():
                return self.slots.take(nbytes)
            self._evict_one()
        return address

    def _evict_one(self) -> None:
        records = self._records
        block = self.leaving.popleft()
        self._has_evicted = True
        job = self.jobs[block]
        self._wait(job)
        if job.error is not None and records.refs[block] > 0:
            # It failed some time ago: what counts is whether the disk works now.
            job = self.jobs[block] = self._writer.submit(job.address, job.nbytes, job.offset)
            self._wait(job)
        del self.jobs[block]
        if records.refs[block] == 0:
            self._free(block)
        elif job.error is not None:
            self.file.give(int(records.offsets[block]))
            records.offsets[block] = -1
            self.seal(block, -1)
            raise job.error
        else:
            records.checksums[block] = job.checksum
            self.slots.give(int(records.addresses[block]), int(records.sizes[block]))
            records.move(block, 0)

    def _wait(self, job: WriteJob) -> None:
        if not job.finished:
            before = perf_counter()
            self._writer.wait(job)
            self.stall_s += perf_counter() - before

    def _start_write(self) -> bool:
        """Hand the oldest sealed block to the writers; False where there is none."""
        records = self._records
        while self._sealed:
            _, owner, block, serial = heapq.heappop(self._sealed)
            if not records.is_current(block, serial):
                continue
            size = int(records.sizes[block])
            records.offsets[block] = self.file.take(owner, size)
            self.jobs[block] = self._writer.submit(int(records.addresses[block]), size, int(records.offsets[block]))
            self.leaving.append(block)
            self.blocks_written += 1
            return True
        return False

    def write_ahead(self) -> None:
        """Where memory gets short, write the next blocks before somebody has to wait for them."""
        if not self._sealed:
            return
        slots, ahead = self.slots, min(AHEAD_BLOCKS, len(self._sealed) // 4 + 1)
        while (
            len(self.leaving) < ahead
            and slots.budget_nbytes - slots.used_nbytes < ahead * self._records.sizes[self._sealed[0][2]]
            and self._start_write()
        ):
            pass

    def close(self) -> None:
        """Stop writers, free memory and file. May be called again."""
        self._writer.close()
        self.file.close()
        self.slots.release_memory()
