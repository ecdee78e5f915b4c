"""What the tests of the KV cache share: small pools, and a plain model of what a table holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.kv import KvLayout
from offload.devices.host import HostDevice
from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import Link
from offload.kv.pool import BlockPool, MemoryAbove
from offload.kv.spill_file import SpillFile
from offload.kv.table import BlockTable, Layouts
from placement.kv_settings import KvSettings

SETTINGS = KvSettings(
    block_tokens=16, segment_blocks=2, recent_tokens=32, staging_segments=3, piece_blocks=1, few_tokens=4
)
HEADS, WIDTH, VALUE_WIDTH = 2, 12, 8
PLAIN = KvLayout("fp32", HEADS, WIDTH, VALUE_WIDTH, SETTINGS.block_tokens)


def small_pool(
    directory: Path,
    blocks: int,
    above: int = 0,
    accelerator: HostAccelerator | None = None,
    **calls: Callable[..., Any],
) -> BlockPool:
    """A pool with memory for so many plain blocks, beside two segments to read into and one to bring down.

    Args:
        directory: of its file.
        blocks: at least 1.
        above: blocks in an accelerator's memory.
        accelerator: that one; None for one with a link that takes no time.
        calls: `pwrite` and `preadv` instead of the system's.
    """
    memory = None
    if above:
        accelerator = HostAccelerator(above * PLAIN.nbytes, Link(1e15, 0.0)) if accelerator is None else accelerator
        memory = MemoryAbove(accelerator, accelerator.allocate(above * PLAIN.nbytes))
    staging = (3 if above else 2) * SETTINGS.segment_blocks * PLAIN.nbytes
    pool = BlockPool(HostDevice(), staging + blocks * PLAIN.nbytes, SpillFile(directory, **calls), memory)
    pool.stage(replace(SETTINGS, staging_segments=2), PLAIN.nbytes)
    if "preadv" in calls:
        hand_over_reads(pool)
    return pool


def hand_over_reads(pool: BlockPool) -> None:
    """Compiled readers have no descriptor from now on, so that Python's calls read."""
    pool.staging.reader.direct_fd = lambda shard: -1  # type: ignore[method-assign]


def pool_below_cuda(directory: Path, blocks: int, above: int, largest: int = PLAIN.nbytes) -> BlockPool:
    """A pool below a GPU that host memory plays, poisoned before it is written."""
    # Triton, which asks for it when it is imported, does not belong to all tests of caches.
    from offload.devices.cuda import CudaDevice
    from tests.devices.fake_cuda import FakeCudaDriver

    device = CudaDevice(FakeCudaDriver(), above * largest)
    memory = MemoryAbove(device, device.allocate(above * largest))
    staging = 3 * SETTINGS.segment_blocks * largest
    pool = BlockPool(HostDevice(), staging + blocks * largest, SpillFile(directory), memory)
    pool.stage(replace(SETTINGS, staging_segments=2), largest)
    return pool


def make_table(pool: BlockPool, sequences: int, packed: str | None = None) -> BlockTable:
    layout = None if packed is None else KvLayout(packed, HEADS, WIDTH, VALUE_WIDTH, SETTINGS.block_tokens)
    return BlockTable(pool, Layouts(PLAIN, layout), SETTINGS, sequences)


def random_states(generator: torch.Generator, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(sequences, HEADS, tokens, WIDTH, generator=generator)
    values = torch.randn(sequences, HEADS, tokens, VALUE_WIDTH, generator=generator)
    return keys, values


class Twin:
    """A table and the plain tensors that it stands for, changed together."""

    def __init__(self, table: BlockTable, seed: int = 0) -> None:
        self.table = table
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = random_states(self.generator, table.sequences, 0)

    def append(self, tokens: int) -> None:
        keys, values = random_states(self.generator, self.table.sequences, tokens)
        self.table.append(keys, values)
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def crop(self, tokens: int) -> None:
        self.table.crop(tokens)
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]

    def select(self, rows: list[int]) -> None:
        self.table.select(np.array(rows))
        self.keys, self.values = self.keys[rows], self.values[rows]

    def copy(self) -> Twin:
        other = Twin(self.table.copy(), seed=int(torch.randint(1 << 30, (), generator=self.generator)))
        other.keys, other.values = self.keys.clone(), self.values.clone()
        return other

    def check(self) -> None:
        """The table holds exactly the tensors' tokens."""
        assert self.table.tokens == self.keys.shape[2] and self.table.sequences == len(self.keys)
        for row in range(len(self.keys)):
            if self.table.tokens:
                keys, values = self.table.read(row, 0, self.table.tokens)
                assert torch.equal(keys, self.keys[row]) and torch.equal(values, self.values[row])
