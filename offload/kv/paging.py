"""What all paged layers of a model share: the pool, how blocks lie, and what happened."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import torch

from formats.kv import KvLayout
from offload.devices.base import Device, KvAccelerator
from offload.errors import ClosedError, SlowKvWarning
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.kv.pool import BlockPool, MemoryAbove
from offload.kv.sparsity.named import make_sparsity
from offload.kv.spill_file import SpillFile
from offload.kv.statistics import KvStatistics, kv_statistics
from offload.kv.table import BlockTable, Layouts
from placement import kv
from placement.kv_settings import KvSettings
from placement.kv_sparsity import KvSparsity


class Paging:
    """Makes tables. The pool is made when the first one is, and again in a forked child.

    Attributes:
        format: of blocks, or of old ones where it is a packed one; None for the model's own dtype.
        settings: how histories are cut.
        ram_nbytes: bound on the memory of all blocks.
        sparsity: how tables are attended to in part; None for all of them.
        latent_width: channels of latents where keys are latents and values the rest of what is cached (MLA), and both
            are kept as one; 0 where they are not.
    """

    def __init__(
        self,
        device: Device,
        ram_nbytes: int,
        directory: Path,
        format: str | None = None,
        settings: KvSettings | None = None,
        sparsity: KvSparsity | None = None,
        accelerator: KvAccelerator | None = None,
        vram_nbytes: int = 0,
    ) -> None:
        """Nothing is allocated yet.

        Args:
            device: of host memory.
            ram_nbytes: see above.
            directory: where blocks go that leave memory.
            format: see above.
            settings: None for those that plans are made with.
            sparsity: see above.
            accelerator: in whose memory the newest blocks lie, None for host memory.
            vram_nbytes: bound on these.
        """
        self.format = format
        self.settings = kv.SETTINGS if settings is None else settings
        self.ram_nbytes = ram_nbytes
        self.sparsity = sparsity
        self.latent_width = 0
        self._device = device
        self._accelerator = accelerator
        self._vram_nbytes = vram_nbytes if accelerator is not None else 0
        self._memory_above: MemoryAbove | None = None
        self._directory = directory
        self._pool: BlockPool | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    @property
    def pool(self) -> BlockPool:
        """The pool of this process.

        Raises:
            ClosedError: after `close()`.
            StorageError: its file cannot be made.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the model's runtime was closed; load the model again")
            if self._pool is None or not self._pool.is_of_this_process:
                self._pool = BlockPool(self._device, self.ram_nbytes, SpillFile(self._directory), self._above())
            return self._pool

    def reserve(self) -> None:
        """Take the accelerator's memory now, not with the first token.

        Raises:
            DoesNotFitError: it has not so much.
        """
        with self._lock:
            self._above()

    def _above(self) -> MemoryAbove | None:
        """The accelerator's memory, taken once: a forked child has a copy of its own."""
        if self._memory_above is None and self._accelerator is not None and self._vram_nbytes:
            self._memory_above = MemoryAbove(self._accelerator, self._accelerator.allocate(self._vram_nbytes))
        return self._memory_above

    def make_table(self, keys: torch.Tensor, values: torch.Tensor) -> BlockTable:
        """An empty table for keys [B, H, T, D] and values [B, H, T, V]."""
        dtype, size = FORMAT_OF_DTYPE[keys.dtype], self.settings.block_tokens
        heads, width, value_width = keys.shape[1], keys.shape[3], values.shape[3]
        shape: tuple[int, ...] = heads, width, value_width, size
        if heads == 1 and width == self.latent_width:
            shape = 1, width + value_width, 0, size, width
        format = dtype if self.format is None else self.format
        packed = KvLayout(format, *shape) if kv.is_packed(format) else None
        plain = KvLayout(dtype if packed is not None else format, *shape)
        return self.empty_table(Layouts(plain, packed), keys.shape[0])

    def empty_table(self, layouts: Layouts, sequences: int) -> BlockTable:
        """A table without tokens."""
        pool, settings = self.pool, self.settings
        largest = max(layouts.plain.nbytes, 0 if layouts.packed is None else layouts.packed.nbytes)
        pool.stage(settings, largest)
        table = BlockTable(pool, layouts, settings, sequences)
        if self.sparsity is not None:
            table.sparsity = make_sparsity(self.sparsity)
        return table

    def __deepcopy__(self, memo: object) -> Paging:
        # Copies of a cache share what all caches of a model share.
        return self

    def note_paged(self) -> None:
        """Attention was computed where the blocks lie."""
        self.pool.counters.paged_steps += 1

    def note_gathered(self, reason: str) -> None:
        """All keys and values of a layer had to be gathered, for a reason that is told once."""
        counters = self.pool.counters
        counters.gathered_steps += 1
        counters.gathered.add(reason)
        if self.sparsity is not None:
            counters.sparsity.refused.add(reason)
        with self._lock:
            if reason in self._warned:
                return
            self._warned.add(reason)
        warnings.warn(
            f"{reason}: keys and values of a whole layer are gathered from the KV cache's blocks for every such call, "
            "which takes time and memory; stats().kv counts them",
            SlowKvWarning,
            stacklevel=2,
        )

    def statistics(self) -> KvStatistics | None:
        """The figures so far; None before the first token."""
        with self._lock:
            pool = self._pool
        return None if pool is None else kv_statistics(pool, self.format, self.sparsity)

    def check(self) -> None:
        """Prove that blocks are accounted for; see `BlockPool.check`."""
        with self._lock:
            pool = self._pool
        if pool is not None:
            pool.check()

    def close(self) -> None:
        """Free memory and file. May be called again."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            self._memory_above = None
        if pool is not None:
            pool.close()
