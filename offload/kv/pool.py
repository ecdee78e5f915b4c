"""Blocks of all caches of one model: in an accelerator's memory, in the host's, or on disk."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from offload.devices.base import Device, KvAccelerator, Slab
from offload.errors import ClosedError, UnsupportedOperationError
from offload.kv import contents
from offload.kv.above import Above
from offload.kv.below import Below
from offload.kv.held import Held
from offload.kv.records import BlockRecords
from offload.kv.slots import RamSlots, view
from offload.kv.sparsity.counters import SparsityCounters
from offload.kv.spill_file import SpillFile
from offload.kv.staging import Staging
from placement.kv_settings import KvSettings

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass
class PoolCounters:
    """Counted since the start.

    Attributes:
        blocks_read: blocks read back.
        paged_steps: attention calls of layers that computed where blocks lie.
        accelerated_steps: passes of few tokens over a table of which an accelerator attended to a part.
        gathered_steps: attention calls that had to have a layer's keys and values as plain tensors.
        gathered: why, by model class.
        sparsity: what attention to a part of tables did.
    """

    blocks_read: int = 0
    paged_steps: int = 0
    accelerated_steps: int = 0
    gathered_steps: int = 0
    gathered: set[str] = field(default_factory=set)
    sparsity: SparsityCounters = field(default_factory=SparsityCounters)


@dataclass(frozen=True)
class MemoryAbove:
    """Memory of an accelerator for the newest blocks.

    Attributes:
        accelerator: which attends to them there.
        slab: the memory.
    """

    accelerator: KvAccelerator
    slab: Slab


class BlockPool:
    """Hands out blocks by number. The caller holds `lock` while it uses a block's memory: blocks leave only when
    others are made, which takes the lock too.

    A block is open (its owner writes to it), sealed (it stays as it is and may leave memory, the oldest tokens
    first), or on disk. Where there is an accelerator, blocks are made in its memory and go from there to the host's.
    Sequences share blocks; `refs` counts them.

    Attributes:
        lock: see above.
        ram_nbytes: bound on host memory.
        records: what is known of each block.
        above: an accelerator's memory; None without one, and before the first table.
        below: the host's.
        staging: memory for blocks that are read back.
        counters: see `PoolCounters`.
        abandoned: blocks of tables that are gone; released when memory is next asked for, because a garbage
            collection that happens in the middle of a change must not make another.
    """

    def __init__(
        self, device: Device, ram_nbytes: int, file: SpillFile, memory_above: MemoryAbove | None = None
    ) -> None:
        """An empty pool.

        Args:
            device: whose memory.
            ram_nbytes: bound on the host memory of all blocks, those included that are read back or brought down.
            file: where blocks go; the pool's to close.
            memory_above: where blocks are made as long as there is room; None for host memory.
        """
        self.lock = threading.RLock()
        self.ram_nbytes = ram_nbytes
        self.above: Above | None = None
        self.counters = PoolCounters()
        self.abandoned: deque[Held] = deque()
        self.records = BlockRecords()
        self.below = Below(self.records, device, ram_nbytes, file, self._free)
        self.staging = Staging(device, file.reader())
        self._device = device
        self._memory_above = memory_above
        self._landing: Slab | None = None
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self._process = os.getpid()
        self._closed = False

    _segment_blocks: int
    _segment_tokens: int

    @property
    def addresses(self) -> Int64:
        """By block, in whatever memory it is; 0 where it is on disk only."""
        return self.records.addresses

    @property
    def is_above(self) -> Bool:
        """By block: in an accelerator's memory."""
        return self.records.is_above

    @property
    def refs(self) -> Int32:
        """By block, references."""
        return self.records.refs

    @property
    def slots(self) -> RamSlots:
        """Of host memory."""
        return self.below.slots

    @property
    def file(self) -> SpillFile:
        """Where blocks go from host memory."""
        return self.below.file

    def stage(self, settings: KvSettings, nbytes: int) -> None:
        """See that segments of some size can be read back: as many as settings say if they take no more than a quarter
        of the memory, at least two.

        Args:
            settings: the same in every call.
            nbytes: of a block.
        """
        with self.lock:
            self._segment_blocks = settings.segment_blocks
            self._segment_tokens = settings.segment_blocks * settings.block_tokens
            segment = settings.segment_blocks * nbytes
            wanted = max(2 * segment, min(settings.staging_segments * segment, self.ram_nbytes // 4))
            landing = 0
            if self._memory_above is not None:
                landing = self._land(segment, nbytes)
            if wanted > self.staging.budget_nbytes:
                self.staging.budget_nbytes = wanted
            self.slots.shrink(max(0, self.ram_nbytes - self.staging.budget_nbytes - landing))

    def _land(self, segment_nbytes: int, nbytes: int) -> int:
        """Make the accelerator's tier, and host memory into which a segment of it can be brought; the bytes of that."""
        memory = self._memory_above
        assert memory is not None
        if self.above is None:
            self.above = Above(self.records, memory.accelerator, memory.slab, nbytes, self.below, self._free)
        if self._landing is None or self._landing.nbytes < segment_nbytes:
            self._landing = self._device.allocate(segment_nbytes)
        return self._landing.nbytes

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
        address = None
        if self.above is not None:
            self.above.move_ahead()
            address = self.above.take(nbytes)
        is_above = address is not None
        if address is None:
            address = self.below.take(nbytes)
        block = self.records.take(address, nbytes, owner, is_above=is_above)
        self.below.write_ahead()
        return block

    def scratch(self, elements: int) -> torch.Tensor:
        """Fp32 memory that is anybody's who holds the lock, [elements]; where it grows, `records.version` changes."""
        if len(self._scratch) < elements:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self._scratch = torch.empty(elements + elements // 2, dtype=torch.float32, device="cpu")
            self.records.version += 1
        return self._scratch[:elements]

    def share(self, blocks: npt.NDArray[np.int64]) -> None:
        """Count one more reference for each."""
        np.add.at(self.refs, blocks, 1)

    def release(self, blocks: npt.NDArray[np.int64]) -> None:
        """Count one reference less for each; blocks without any are free."""
        np.subtract.at(self.refs, blocks, 1)
        for block in {int(one) for one in blocks[self.refs[blocks] == 0]}:
            # A block that is being written or moved is freed when it would leave.
            if not self._is_leaving(block):
                self._free(block)

    def _is_leaving(self, block: int) -> bool:
        return block in self.below.jobs or (self.above is not None and self.above.is_moving(block))

    def release_abandoned(self) -> None:
        """Free what tables that are gone referred to. The caller holds the lock."""
        while self.abandoned:
            self.release(self.abandoned.popleft().cut(0))

    @contextmanager
    def at_hand(self, blocks: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Within it, addresses in host memory of blocks wherever they are, at most a segment of them; those on disk are
        read, those above brought down.

        Raises:
            StorageError, StoreCorruptError: one cannot be read.
        """
        key = self.key(blocks)
        if not self.start(key, blocks):
            self.staging.drop_all()
            self.start(key, blocks)
        try:
            yield self.fetch(key, blocks)
        finally:
            self.drop(key)

    def key(self, blocks: npt.NDArray[np.int64]) -> bytes:
        """What names blocks on disk while they are staged: their numbers, and how often each was used before.

        Empty where none is on disk.
        """
        cold = blocks[self.addresses[blocks] == 0]
        return bytes(cold.tobytes() + self.records.serials[cold].tobytes())

    def start(self, key: bytes, blocks: npt.NDArray[np.int64]) -> bool:
        """Begin to read those of some blocks that are on disk, unless that has begun; False where there is no room.

        Args:
            key: `key(blocks)`.
            blocks: of one size, at most a segment.
        """
        if not key or self.staging.is_started(key):
            return True
        records = self.records
        cold = blocks[records.addresses[blocks] == 0]
        nbytes = int(records.sizes[cold[0]])
        started = self.staging.start(
            key, records.offsets[cold].tolist(), records.checksums[cold].tolist(), nbytes, self._segment_blocks * nbytes
        )
        self.counters.blocks_read += len(cold) if started else 0
        return started

    def fetch(self, key: bytes, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Wait for blocks that were started; addresses in host memory of all of them.

        Those of blocks above hold until the next call.
        """
        addresses = self.addresses[blocks]
        cold = np.flatnonzero(addresses == 0)
        if len(cold):
            addresses[cold] = self.staging.fetch(key) + np.arange(len(cold)) * self.records.sizes[blocks[cold[0]]]
        above = np.flatnonzero(self.is_above[blocks])
        if len(above):
            assert self.above is not None and self._landing is not None
            sizes = self.records.sizes[blocks[above]]
            targets = self._landing.address + np.arange(len(above)) * sizes
            self.above.bring(zip(addresses[above].tolist(), targets.tolist(), sizes.tolist(), strict=True))
            addresses[above] = targets
        return addresses

    def copy(self, source: int, target: int) -> None:
        """Give a block the bytes of another of its size, wherever that is.

        Raises:
            StorageError, StoreCorruptError: that one cannot be read.
        """
        nbytes = int(self.records.sizes[target])
        if self.above is not None and self.is_above[source] and self.is_above[target]:
            addresses = int(self.addresses[source]), int(self.addresses[target])
            self.above.accelerator.copy_within(*addresses, nbytes)
            return
        with self.at_hand(np.array([source])) as found:
            contents.fill(self, target, np.frombuffer(view(int(found[0]), nbytes), np.uint8))

    def drop(self, key: bytes) -> None:
        """Blocks that were fetched are not needed any more."""
        if key:
            self.staging.drop(key)

    def seal(self, block: int, first_token: int) -> None:
        """Let a block leave when memory is needed; lower first tokens leave first."""
        if self.is_above[block]:
            assert self.above is not None
            self.above.seal(block, first_token, self._segment_tokens)
        else:
            self.below.seal(block, first_token)

    def reopen(self, block: int) -> bool:
        """Take a sealed block back to write to it; False where it must be copied, for it is shared or leaving."""
        if self.refs[block] != 1 or not self.addresses[block] or self._is_leaving(block):
            return False
        self.records.serials[block] += 1
        return True

    def _free(self, block: int) -> None:
        records, address = self.records, int(self.addresses[block])
        if address:
            slots = self.above.slots if self.above is not None and self.is_above[block] else self.slots
            slots.give(address, int(records.sizes[block]))
        if records.offsets[block] >= 0:
            self.file.give(int(records.offsets[block]))
        records.give(block)

    # --- state -------------------------------------------------------------------------------------------------

    def tiers_nbytes(self) -> tuple[int, int, int]:
        """Bytes of blocks in an accelerator's memory, in the host's, and of those on disk only."""
        with self.lock:
            on_disk = (self.refs > 0) & (self.addresses == 0)
            above = 0 if self.above is None else self.above.slots.used_nbytes
            return above, self.slots.used_nbytes, int(self.records.sizes[on_disk].sum())

    def check(self) -> None:
        """Prove that slots, file space and references are accounted for.

        Raises:
            AssertionError: they are not.
        """
        with self.lock:
            records = self.records
            free = set(records.free)
            assert len(free) == len(records.free), "a block is free twice"
            for block in range(len(self.refs)):
                held = self.addresses[block] != 0 or records.offsets[block] >= 0
                expected = block not in free
                assert held == expected, f"block {block}: held {held}, expected {expected}"
                assert self.refs[block] == 0 or expected, f"block {block} is free and referred to"
                assert self.refs[block] > 0 or not expected or self._is_leaving(block), f"block {block} leaked"
            resident = self.addresses != 0
            assert len(set(self.addresses[resident].tolist())) == int(resident.sum()), "two blocks in one slot"
            assert set(self.below.jobs) == set(self.below.leaving), "a block leaves that nobody writes"
            coming, used_above = 0, 0
            if self.above is not None:
                self.above.check()
                coming, used_above = self.above.moving_nbytes(), self.above.slots.used_nbytes
            in_ram, above = (int(records.sizes[resident & which].sum()) for which in (~self.is_above, self.is_above))
            assert in_ram + coming == self.slots.used_nbytes, "slots are not accounted for"
            assert above == used_above, "slots above are not accounted for"

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
            if self.above is not None:
                self.above.close()
            self.staging.close()
            self.below.close()
