"""Expert reads through the runtime's engine against a raw O_DIRECT loop of the same blocks and threads."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks import checkpoints
from benchmarks.equality import GATED_BUNDLES, gate_same_bits, stored_and_converted
from benchmarks.harness import Report, Spread, interleave, ratios
from benchmarks.raw_io import Block, blocks_of, read_blocks
from offload.devices.host import HostDevice
from offload.preparation import PreparedCheckpoint
from offload.store import ExpertStore, convert
from offload.tiers.arena import Arena
from offload.tiers.direct_engine import make_engine
from offload.tiers.disk import ShardReader
from offload.tiers.transfer import Completion, ReadRequest, Urgency
from placement.plan import Plan


@dataclass(frozen=True)
class DiskScale:
    """How much to read: `turn_nbytes` in each of `rounds` turns of each side."""

    turn_nbytes: int
    rounds: int
    block_sizes: tuple[int, ...] = (1 << 20, 4 << 20, 16 << 20)
    threads: tuple[int, ...] = (1, 4, 16)


FULL = DiskScale(turn_nbytes=1 << 30, rounds=7)
QUICK = DiskScale(turn_nbytes=24 << 20, rounds=3, block_sizes=(1 << 20, 4 << 20), threads=(1, 4))

Bundles = list[tuple[int, int]]
"""(group, expert) of each."""


def run(work: Path, shape: checkpoints.Shape, scale: DiskScale) -> Report:
    """The benchmark; the store is made unless it is there."""
    report = Report("disk")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    prepared = checkpoints.prepare(checkpoint, None, 1024, checkpoints.store_root(work))
    with closing(prepared.checkpoint):
        store = convert(prepared.bundles, checkpoints.store_root(work))
        bundles = [(group, expert) for group, layer in enumerate(store.groups) for expert in range(layer.count)]
        shuffle = random.Random(0)
        shuffle.shuffle(bundles)
        with closing(EngineReads(store, prepared.plan, in_flight=shape.top_k)) as engine:
            _gate(report, engine, prepared, store, bundles[:GATED_BUNDLES])
            _compare(report, engine, store, prepared.plan, bundles, scale)
    _context(report, store, scale)
    report.notes.append(
        "Bundles in random order; the engine verifies the checksum of each, the raw loop does not. Both sides of a "
        f"round read different bundles with O_DIRECT. The engine has {shape.top_k} bundles queued, as a decode step."
    )
    return report


class EngineReads:
    """The runtime's own engine over a store, reading into touched slots."""

    def __init__(self, store: ExpertStore, plan: Plan, in_flight: int) -> None:
        reader = ShardReader(store.shard_paths, lambda index, direct: store.open_shard(index, direct=direct))
        self._engine = make_engine(reader, threads=plan.reader_threads, chunk_nbytes=plan.read_chunk_nbytes)
        self._store = store
        arena = Arena(HostDevice(), plan.slot_nbytes, in_flight + 1)
        views = [arena.view(slot, plan.slot_nbytes) for slot in range(in_flight)]
        for view in views:
            view[:] = 0
        self._slots = [memoryview(view) for view in views]  # type: ignore[arg-type]

    def _submit(self, bundle: tuple[int, int], slot: memoryview) -> Completion:
        location = self._store.location(*bundle)
        out = slot[: location.nbytes]
        request = ReadRequest(location.shard, location.offset, out, self._store.checksum(*bundle), f"bundle {bundle}")
        return self._engine.submit(request, Urgency.NOW)

    def read(self, bundles: Bundles) -> float:
        """Seconds to read all bundles, as many at a time as there are slots."""
        pending: dict[Completion, memoryview] = {}
        free = list(self._slots)
        before = perf_counter()
        for bundle in bundles:
            if not free:
                self._engine.wait_any(pending)
                for ticket in [ticket for ticket in pending if ticket.finished]:
                    free.append(self._collect(ticket, pending))
            slot = free.pop()
            pending[self._submit(bundle, slot)] = slot
        self._engine.wait_all(pending)
        seconds = perf_counter() - before
        for ticket in list(pending):
            self._collect(ticket, pending)
        return seconds

    @staticmethod
    def _collect(ticket: Completion, pending: dict[Completion, memoryview]) -> memoryview:
        if ticket.error is not None:
            raise ticket.error
        return pending.pop(ticket)

    def bytes_of(self, bundle: tuple[int, int]) -> bytes:
        """One bundle, as the engine reads it."""
        self.read([bundle])
        # A free slot is taken from the end.
        return bytes(self._slots[-1][: self._store.location(*bundle).nbytes])

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


def _gate(
    report: Report, engine: EngineReads, prepared: PreparedCheckpoint, store: ExpertStore, bundles: Bundles
) -> None:
    found = stored_and_converted(store, prepared.bundles, bundles)
    found["engine"] = [engine.bytes_of(bundle) for bundle in bundles]
    gate_same_bits(report, f"{len(bundles)} bundles", found)


def _compare(
    report: Report, engine: EngineReads, store: ExpertStore, plan: Plan, bundles: Bundles, scale: DiskScale
) -> None:
    count = max(1, min(scale.turn_nbytes // plan.slot_nbytes, len(bundles) // 2))
    samples = [random.Random(seed).sample(bundles, 2 * count) for seed in range(scale.rounds)]
    ours = iter([sample[:count] for sample in samples])
    theirs = iter([sample[count:] for sample in samples])
    nbytes = count * store.groups[0].layout.nbytes
    engine.read(bundles[:count])
    seconds = interleave(
        {
            "engine": lambda: engine.read(next(ours)),
            "raw": lambda: read_blocks(store.shard_paths, _blocks(store, plan, next(theirs)), plan.reader_threads),
        },
        scale.rounds,
    )
    speeds = {side: [nbytes / value / 1e9 for value in values] for side, values in seconds.items()}
    ratio = ratios(speeds["engine"], speeds["raw"])
    report.tables["Expert reads"] = [
        {
            "reads through": side,
            "block KiB": min(plan.slot_nbytes, plan.read_chunk_nbytes) >> 10,
            "threads": plan.reader_threads,
            "MB a turn": nbytes / 1e6,
            "GB/s": Spread.of(speeds[side]),
            "share of raw": ratio if side == "engine" else None,
        }
        for side in ("engine", "raw")
    ]
    report.target("engine / raw O_DIRECT loop", ratio.median, "at least", 0.90)


def expert_blocks(work: Path, checkpoint: Path, nbytes: int) -> tuple[Sequence[Path], list[Block]]:
    """The shards of a checkpoint's store, and reads of random bundles of about so many bytes together."""
    store, plan, bundles = _store_of(work, checkpoint)
    return store.shard_paths, _sample(store, plan, bundles, nbytes, seed=0)


def _sample(store: ExpertStore, plan: Plan, bundles: Bundles, nbytes: int, seed: int) -> list[Block]:
    count = max(1, min(nbytes // plan.slot_nbytes, len(bundles)))
    return _blocks(store, plan, random.Random(seed).sample(bundles, count))


def _store_of(work: Path, checkpoint: Path) -> tuple[ExpertStore, Plan, Bundles]:
    prepared = checkpoints.prepare(checkpoint, None, 1024, checkpoints.store_root(work))
    with closing(prepared.checkpoint):
        store = convert(prepared.bundles, checkpoints.store_root(work))
    bundles = [(group, expert) for group, layer in enumerate(store.groups) for expert in range(layer.count)]
    return store, prepared.plan, bundles


def raw_expert_bandwidth(work: Path, checkpoint: Path) -> float:
    """Bytes per second of raw reads of random bundles; the median of three."""
    store, plan, bundles = _store_of(work, checkpoint)
    speeds = []
    for seed in range(3):
        blocks = _sample(store, plan, bundles, 512 << 20, seed)
        seconds = read_blocks(store.shard_paths, blocks, plan.reader_threads)
        speeds.append(sum(block.nbytes for block in blocks) / seconds)
    return statistics.median(speeds)


def _blocks(store: ExpertStore, plan: Plan, bundles: Bundles) -> list[Block]:
    """The reads that the engine makes of these bundles: each in chunks."""
    chunk = plan.read_chunk_nbytes
    return [
        Block(location.shard, location.offset + start, min(chunk, location.nbytes - start))
        for location in (store.location(*bundle) for bundle in bundles)
        for start in range(0, location.nbytes, chunk)
    ]


def _context(report: Report, store: ExpertStore, scale: DiskScale) -> None:
    rows = report.tables.setdefault("The disk, raw O_DIRECT reads in random order", [])
    for size in scale.block_sizes:
        blocks = [block for block in blocks_of(store.shard_paths, size) if block.nbytes == size]
        if not blocks:
            continue
        count = max(1, min(scale.turn_nbytes // size, len(blocks)))
        for threads in scale.threads:
            samples = [random.Random(seed).sample(blocks, count) for seed in range(3)]
            speeds = [count * size / read_blocks(store.shard_paths, sample, threads) / 1e9 for sample in samples]
            rows.append({"block KiB": size >> 10, "threads": threads, "GB/s": Spread.of(speeds)})
