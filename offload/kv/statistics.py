"""What a paged KV cache did, in figures."""

from __future__ import annotations

from dataclasses import dataclass

from offload.kv.pool import BlockPool
from placement.kv_sparsity import KvSparsity


@dataclass(frozen=True)
class SparsityStatistics:
    """What attention to a part of the KV cache did, which is lossy.

    Attributes:
        method: which, and the share of tokens or blocks, as "top-k:0.05".
        sparse_steps: attention of one layer in one pass of few tokens that left cached tokens out.
        full_steps: that attended to all, because a history was too short to leave any out.
        captured_mass: mean share of exact attention that the tokens that were attended to, or kept, have: of top-k in
            the first and every 512th step of each layer, of snapkv for a prompt's last queries, of h2o in all attention
            until it first evicts. None before the first measurement.
        measured: how many.
        evicted_tokens: of all layers and sequences.
        refused: why attention stayed full elsewhere, each reason once.
    """

    method: str
    sparse_steps: int
    full_steps: int
    captured_mass: float | None
    measured: int
    evicted_tokens: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        mass = "" if self.captured_mass is None else f", {self.captured_mass:.1%} of exact attention captured"
        return f"{self.method} (lossy) in {self.sparse_steps} of {self.sparse_steps + self.full_steps} steps{mass}"


@dataclass(frozen=True)
class KvStatistics:
    """Of all caches of a model that are paged, since its pool was made.

    Attributes:
        format: of old blocks, None for the model's own dtype.
        vram_nbytes: bytes of blocks in an accelerator's memory now.
        ram_nbytes: bytes of blocks in host memory now.
        disk_nbytes: bytes of blocks on disk only now.
        vram_budget_nbytes: bound on the first.
        ram_budget_nbytes: bound on the second, with what blocks are read back into.
        blocks_written: blocks that were written to disk.
        blocks_read: blocks that were read back.
        bytes_written: of them.
        bytes_read: of them.
        write_stall_s: seconds that the model waited for memory of blocks that were being written.
        read_stall_s: seconds that the model waited for blocks from disk.
        blocks_moved: blocks that went from an accelerator's memory to the host's.
        bytes_moved: that crossed the link in this direction, those included that were only attended below.
        move_stall_s: seconds that the model waited for that.
        retries: reads and writes that failed or fell short and were repeated.
        direct_io: False where the file system refused O_DIRECT.
        paged_steps: attention of one layer in one pass, computed where the blocks lie.
        accelerated_steps: passes of few tokens over one layer of which an accelerator attended to a part.
        gathered_steps: those for which all keys and values of a layer were gathered first.
        gathered: why, each reason once.
        sparsity: what attention to a part of it did; None where all is attended to.
    """

    format: str | None
    vram_nbytes: int
    ram_nbytes: int
    disk_nbytes: int
    vram_budget_nbytes: int
    ram_budget_nbytes: int
    blocks_written: int
    blocks_read: int
    bytes_written: int
    bytes_read: int
    write_stall_s: float
    read_stall_s: float
    blocks_moved: int
    bytes_moved: int
    move_stall_s: float
    retries: int
    direct_io: bool
    paged_steps: int
    accelerated_steps: int
    gathered_steps: int
    gathered: tuple[str, ...]
    sparsity: SparsityStatistics | None


def kv_statistics(pool: BlockPool, format: str | None, sparsity: KvSparsity | None) -> KvStatistics:
    """The figures so far."""
    counters, reader = pool.counters, pool.staging.reader
    in_vram, in_ram, on_disk = pool.tiers_nbytes()
    above = pool.above
    return KvStatistics(
        format=format,
        vram_nbytes=in_vram,
        ram_nbytes=in_ram,
        disk_nbytes=on_disk,
        vram_budget_nbytes=0 if above is None else above.slots.budget_nbytes,
        ram_budget_nbytes=pool.ram_nbytes,
        blocks_written=pool.below.blocks_written,
        blocks_read=counters.blocks_read,
        bytes_written=pool.file.bytes_written,
        bytes_read=pool.staging.bytes_read,
        write_stall_s=pool.below.stall_s,
        read_stall_s=pool.staging.stall_s,
        blocks_moved=0 if above is None else above.blocks_moved,
        bytes_moved=0 if above is None else above.bytes_moved,
        move_stall_s=0.0 if above is None else above.stall_s,
        retries=reader.retries + pool.file.write_retries,
        direct_io=reader.direct,
        paged_steps=counters.paged_steps,
        accelerated_steps=counters.accelerated_steps,
        gathered_steps=counters.gathered_steps,
        gathered=tuple(sorted(counters.gathered)),
        sparsity=None if sparsity is None else _sparsity_statistics(pool, sparsity),
    )


def _sparsity_statistics(pool: BlockPool, sparsity: KvSparsity) -> SparsityStatistics:
    counters = pool.counters.sparsity
    return SparsityStatistics(
        method=str(sparsity),
        sparse_steps=counters.sparse_steps,
        full_steps=counters.full_steps,
        captured_mass=counters.captured / counters.measured if counters.measured else None,
        measured=counters.measured,
        evicted_tokens=counters.evicted_tokens,
        refused=tuple(sorted(counters.refused)),
    )
