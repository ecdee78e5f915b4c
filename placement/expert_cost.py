"""Seconds of one layer's routed experts, for every number of slots at once.

Experts in VRAM run on the accelerator, others on the CPU in place or, where that ends sooner, on the accelerator
after a copy. All devices, the link and the disk work at the same time; the layer ends when the last of them does.
Experts that come from disk are computed as they arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from placement.disk import Disk, Overlap
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.model_spec import ExpertsSpec
from placement.outputs import groups_of
from placement.routing import FloatArray, LayerDemand

IntArray = npt.NDArray[np.int64]

_MOST_EXACT = 16
"""Up to so many experts of a layer, all outcomes of the caches are weighted; beyond, their means stand for them."""

_NONE = 1e-6
"""Fewer experts than this are rounding errors of means, and cost no call."""

_SHARES: FloatArray = np.linspace(0.0, 1.0, 65)[:, None]
"""Of the experts outside VRAM, what is tried as copied to the accelerator where means are computed with."""


@dataclass(frozen=True)
class ExpertCost:
    """One MoE layer, expected; each an array by number of slots.

    Attributes:
        cpu_s: along the critical path, on the CPU.
        gpu_s: likewise on the accelerator.
        link_s: waiting for copies.
        disk_s: waiting for reads.
        cpu_busy_s: work of the CPU.
        gpu_busy_s: work of the accelerator.
        link_busy_s: work of the link.
        disk_busy_s: work of the disk.
        copied: experts copied to the accelerator.
    """

    cpu_s: FloatArray
    gpu_s: FloatArray
    link_s: FloatArray
    disk_s: FloatArray
    cpu_busy_s: FloatArray
    gpu_busy_s: FloatArray
    link_busy_s: FloatArray
    disk_busy_s: FloatArray
    copied: FloatArray

    @property
    def total_s(self) -> FloatArray:
        """The layer."""
        return self.cpu_s + self.gpu_s + self.link_s + self.disk_s


@dataclass(frozen=True)
class _Reads:
    """How experts come from disk, beside the kernels of those that arrive, and of those that were there."""

    disk: Disk | None
    overlap: Overlap | None
    resident: Overlap | None
    chunk_nbytes: int
    threads: int


@dataclass(frozen=True)
class _Speeds:
    """Seconds of one expert, and of what comes with it."""

    distinct: float
    cpu_s: float
    cpu_call_s: float
    arrival_s: float
    gpu_s: float
    gpu_call_s: float
    copy_s: float
    crossing_s: float
    nbytes: float


def _reads(disk: Disk | None, homes: Homes, need: LayerDemand, nbytes: float, *, decode: bool) -> _Reads:
    overlap = resident = None
    if disk is not None:
        speed = disk.bytes_per_s(int(min(nbytes, homes.read_chunk_nbytes)), homes.reader_threads)
        if decode:
            overlap = disk.overlap(need.tokens_per_expert, speed)
        else:
            overlap = disk.many.beside(speed)
            resident = None if disk.resident is None else disk.resident.beside(speed)
    return _Reads(disk, overlap, resident, homes.read_chunk_nbytes, homes.reader_threads)


def expert_weights(experts: ExpertsSpec) -> int:
    """Weights of one expert."""
    layout = experts.layout
    return (3 if layout.has_gate else 2) * layout.hidden * layout.intermediate


def expert_entries(experts: ExpertsSpec) -> int:
    """Numbers that an expert computes of a token, and rounds: what its projections give, and what enters the last."""
    layout = experts.layout
    return layout.hidden + (3 if layout.has_gate else 2) * layout.intermediate


def cpu_arrival_s(experts: ExpertsSpec, profile: HardwareProfile, *, decode: bool) -> float:
    """Seconds that the CPU takes for each expert that arrives from disk, beside its product, in the place of a call."""
    format = experts.layout.format
    call_s, overheads = profile.cpu.expert(format).call_s, profile.cpu.overheads_in(format)
    if not decode:
        return call_s + overheads.arrival_s
    return call_s if overheads.step_arrival_s is None else overheads.step_arrival_s


def grouping_s(experts: ExpertsSpec, profile: HardwareProfile, outputs: float) -> float:
    """Seconds that a layer of a prompt takes more where its experts, which put out so many numbers, are computed, and
    perhaps summed, group by group.
    """
    groups = groups_of(outputs, accelerated=profile.gpu is not None)
    if groups == 1:
        return 0.0
    format, cpu = experts.layout.format, profile.cpu
    # With an accelerator what a host alone would keep is kept too, and summed at once.
    grouped = outputs if groups_of(outputs, accelerated=False) > 1 else 0.0
    return cpu.overheads_in(format).grouped_output_s * grouped + (groups - 1) * cpu.expert(format).call_s


def expert_cost(
    experts: ExpertsSpec,
    profile: HardwareProfile,
    homes: Homes,
    need: LayerDemand,
    rows: int,
    in_vram: FloatArray,
    in_ram: FloatArray,
    *,
    on_gpu: bool,
    decode: bool = True,
) -> ExpertCost:
    """The cost of one MoE layer.

    Args:
        experts: of the layer.
        profile: the machine.
        homes: how reads are made; its slots are not looked at.
        need: experts and tokens.
        rows: tokens of the pass.
        in_vram: share of the needed experts found in VRAM, by number of slots.
        in_ram: likewise in RAM; the others are read.
        on_gpu: the layer around runs on the accelerator, so its activations are there.
        decode: the pass has one token of each sequence.
    """
    speeds = _speeds(experts, profile, need, rows, on_gpu=on_gpu, decode=decode)
    distinct = round(need.distinct)
    if distinct > _MOST_EXACT or abs(distinct - need.distinct) > 1e-9:
        reads = _reads(profile.disk, homes, need, speeds.nbytes, decode=decode)
        cost = _mean(reads, profile.gpu is not None, speeds, in_vram, in_ram)
    else:
        cost = _expected(profile, homes, need, speeds, in_vram, in_ram, decode=decode)
    if not decode:
        grouping = grouping_s(experts, profile, need.pairs * experts.layout.hidden)
        return _with_cpu(cost, np.full_like(in_ram, grouping))
    # Looking for experts, unless all are always found.
    step_s = profile.cpu.overheads_in(experts.layout.format).step_s
    return _with_cpu(cost, np.where(in_vram + in_ram < 1.0, step_s, 0.0))


def longer_after_reads(profile: HardwareProfile, need: LayerDemand, found: FloatArray) -> FloatArray:
    """How much longer linear layers and attention on the CPU take in decode where an expert was read before, as a share
    of their time; by share of experts found.
    """
    if profile.disk is None:
        return np.zeros(len(found))
    return (1 / profile.disk.between - 1) * (1 - np.clip(found, 0.0, 1.0) ** need.distinct)


def _with_cpu(cost: ExpertCost, seconds: FloatArray) -> ExpertCost:
    """The cost with so much more of the CPU, while nothing else goes on."""
    return replace(cost, cpu_s=cost.cpu_s + seconds, cpu_busy_s=cost.cpu_busy_s + seconds)


def _mean(reads: _Reads, has_gpu: bool, speeds: _Speeds, in_vram: FloatArray, in_ram: FloatArray) -> ExpertCost:
    """The cost of as many experts of each sort as are expected; passes of many tokens find all or nothing."""
    sorts, where = np.unique(np.stack([in_vram, in_ram]), axis=1, return_inverse=True)
    hits = speeds.distinct * sorts[0]
    misses = speeds.distinct * np.clip(1 - sorts[0] - sorts[1], 0.0, 1.0)
    cost = _best(reads, has_gpu, speeds, hits, misses, (speeds.distinct - hits) * _SHARES)
    return ExpertCost(*(getattr(cost, field.name)[where.reshape(-1)] for field in fields(ExpertCost)))


def _expected(
    profile: HardwareProfile,
    homes: Homes,
    need: LayerDemand,
    speeds: _Speeds,
    in_vram: FloatArray,
    in_ram: FloatArray,
    *,
    decode: bool,
) -> ExpertCost:
    """The mean over all outcomes of independent lookups, one for each needed expert."""
    distinct = round(need.distinct)
    reads_needed = bool((1 - in_vram - in_ram > 1e-12).any())
    reads = _reads(profile.disk if reads_needed else None, homes, need, speeds.nbytes, decode=decode)
    hits, misses, ways, costs = _all_outcomes(reads, profile.gpu is not None, speeds, distinct, reads_needed)
    missing = np.clip(1 - in_vram - in_ram, 0.0, 1.0)
    # Powers by columns of a small table: 0, 1, ... distinct.
    powers = np.arange(distinct + 1)
    found, lost, kept = (share[:, None] ** powers for share in (in_vram, missing, np.clip(in_ram, 0.0, 1.0)))
    probability = ways * found[:, hits] * lost[:, misses] * kept[:, distinct - hits - misses]
    return ExpertCost(*(probability @ getattr(costs, field.name) for field in fields(ExpertCost)))


@lru_cache(maxsize=512)
def _all_outcomes(
    reads: _Reads, has_gpu: bool, speeds: _Speeds, distinct: int, missing: bool
) -> tuple[IntArray, IntArray, FloatArray, ExpertCost]:
    """(experts in VRAM, experts to be read, ways in which that can be, costs) of every outcome."""
    outcomes = [(h, m) for h in range(distinct + 1) for m in range(distinct - h + 1 if missing else 1)]
    hits, misses = np.array(outcomes, dtype=np.int64).T
    whole = np.arange(distinct + 1, dtype=np.float64)[:, None]
    costs = _best(reads, has_gpu, speeds, hits * 1.0, misses * 1.0, np.minimum(whole, distinct - hits))
    ways = np.array([float(math.comb(distinct, h) * math.comb(distinct - h, m)) for h, m in outcomes])
    return hits, misses, ways, costs


def _best(
    reads: _Reads, has_gpu: bool, speeds: _Speeds, hits: FloatArray, misses: FloatArray, copied: FloatArray
) -> ExpertCost:
    """The cost with the best number of experts copied to the accelerator.

    Args:
        reads: how experts come from disk.
        has_gpu: whether there is an accelerator.
        speeds: of one expert.
        hits: [n] experts in VRAM.
        misses: [n] experts to be read.
        copied: [choices, n] what may be tried.
    """
    host = speeds.distinct - hits
    if not has_gpu:
        copied = np.zeros((1, len(hits)))
    disk, first = _disk_s(reads, speeds.nbytes, misses)
    tried = _outcomes(
        reads, speeds, hits[None, :], misses[None, :], host[None, :], copied, disk[None, :], first[None, :]
    )  # fmt: skip
    best = np.argmin(tried.total_s, axis=0)
    columns = np.arange(len(hits))
    return ExpertCost(
        *(np.broadcast_to(getattr(tried, f.name), copied.shape)[best, columns] for f in fields(ExpertCost))
    )


def _outcomes(
    reads: _Reads,
    speeds: _Speeds,
    hits: FloatArray,
    misses: FloatArray,
    host: FloatArray,
    copied: FloatArray,
    disk: FloatArray,
    first: FloatArray,
) -> ExpertCost:
    """Costs [choices, n] where `copied` of the `host` experts that are not in VRAM go to the accelerator.

    The last expert to arrive from disk is still to be computed. Until the first is there the CPU has those that were in
    RAM; it and the disk slow each other down.
    """
    c, g, p = speeds.cpu_s, speeds.gpu_s, speeds.copy_s
    on_cpu, on_gpu = np.where(host - copied > _NONE, host - copied, 0.0), hits + copied
    # Resident experts share a call; each that arrives has its own.
    cpu = on_cpu * c + np.where(on_cpu > 0, speeds.cpu_call_s + speeds.arrival_s * np.minimum(misses, on_cpu), 0.0)
    gpu = on_gpu * g + np.where(on_gpu > 0, speeds.gpu_call_s, 0.0)
    link = copied * p + np.where(on_gpu > 0, speeds.crossing_s, 0.0)
    last = np.where(on_cpu > 0, np.minimum(c + speeds.arrival_s, cpu), p + g)
    resident = np.where(on_cpu > misses, (on_cpu - misses) * c + speeds.cpu_call_s, 0.0)
    after = np.zeros_like(disk)
    if reads.overlap is not None:
        until, computed, read = _beside_resident(reads.resident, resident, disk)
        idle = np.minimum(np.maximum(first - until - (resident - computed), 0.0), disk - read)
        both = reads.overlap.seconds(np.maximum(cpu - last - computed, 0.0), disk - read - idle)
        after = np.where(misses > 0, until + idle + both + last, 0.0)
    compute = np.maximum(cpu, gpu)
    linked = np.maximum(link + np.where(copied > 0, g, 0.0), compute)
    longer = cpu >= gpu
    return ExpertCost(
        cpu_s=np.where(longer, compute, 0.0),
        gpu_s=np.where(longer, 0.0, compute),
        link_s=linked - compute,
        disk_s=np.maximum(linked, after) - linked,
        cpu_busy_s=cpu,
        gpu_busy_s=gpu,
        link_busy_s=link,
        disk_busy_s=disk,
        copied=copied,
    )


def _beside_resident(
    overlap: Overlap | None, resident: FloatArray, disk: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(seconds until either the experts that were in RAM are computed or all others are read, and how much of both is
    done then); nothing where these kernels are not told apart from those of experts that arrive.
    """
    if overlap is None:
        nothing = np.zeros_like(disk)
        return nothing, nothing, nothing
    until = np.minimum(resident / overlap.kernels, disk / overlap.reads)
    return until, overlap.kernels * until, overlap.reads * until


def _disk_s(reads: _Reads, nbytes: float, misses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(seconds until all misses are read, until the first is); few reads do not keep the disk busy."""
    if not misses.any():
        return np.zeros_like(misses), np.zeros_like(misses)
    if reads.disk is None:
        raise ValueError("the hardware profile has no disk, and not every expert has a slot; profile the machine again")
    block = int(min(nbytes, reads.chunk_nbytes))
    pieces = math.ceil(nbytes / reads.chunk_nbytes)
    most = max(1, math.ceil(reads.threads / pieces))
    speeds = [reads.disk.bytes_per_s(block, min(reads.threads, bundles * pieces)) for bundles in range(1, most + 1)]

    def going_on_s(count: FloatArray) -> FloatArray:
        whole = np.zeros_like(count)
        for bundles, speed in enumerate(speeds, 1):
            # As many as can be in flight read at this speed, and more do in turn; never sooner than fewer.
            so_many = np.minimum(count, bundles) if bundles < most else count
            whole = np.maximum(whole, np.where(count > bundles - 1, so_many * nbytes / speed, 0.0))
        return whole

    whole = going_on_s(misses)
    together = np.minimum(np.maximum(misses, 1.0), most)
    first = whole * together / np.maximum(misses, 1.0)
    startup = np.where(misses > 0, reads.disk.startup_s(nbytes, misses, going_on_s), 0.0)
    return startup + whole, startup + first


def _speeds(
    experts: ExpertsSpec, profile: HardwareProfile, need: LayerDemand, rows: int, *, on_gpu: bool, decode: bool
) -> _Speeds:
    layout = experts.layout
    weights, entries, tokens = expert_weights(experts), expert_entries(experts), need.tokens_per_expert
    cpu = profile.cpu.expert(layout.format)
    c = cpu.without_call_s(weights, tokens, entries)
    arrival_s = cpu_arrival_s(experts, profile, decode=decode)
    if profile.gpu is None or profile.to_gpu is None or profile.from_gpu is None:
        return _Speeds(need.distinct, c, cpu.call_s, arrival_s, 0.0, 0.0, 0.0, 0.0, layout.nbytes)
    gpu = profile.gpu.expert(layout.format)
    activations = rows * layout.hidden * 2
    # Activations cross between the layer around and the experts that run on the other side.
    crossing = profile.to_gpu.seconds(activations) + profile.from_gpu.seconds(activations)
    return _Speeds(
        need.distinct,
        c,
        cpu.call_s + (crossing if on_gpu else 0.0),
        arrival_s + (crossing if on_gpu else 0.0),
        gpu.without_call_s(weights, tokens, entries),
        gpu.call_s,
        profile.to_gpu.seconds(layout.nbytes),
        0.0 if on_gpu else crossing,
        layout.nbytes,
    )
