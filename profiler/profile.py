"""The measurement of a machine beside its accelerators: memory, disk, kernels by format and tokens, overheads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from formats.kv import KV_FORMATS
from placement.disk import BURST_READS, FEW_READS, GOING_ON_READS, Disk, DiskPoint, Overlap
from placement.hardware_profile import SMALL_PROMPT_TOKENS, Compute, HardwareProfile, Overheads, Provenance
from profiler.effort import FULL, Effort
from profiler.machine import Machine, now
from profiler.memory import available_ram_nbytes
from profiler.points import expert_points, linear_points
from profiler.rounds import PACKED, AttentionPoint, Found
from profiler.subjects import Attention, Subjects

_MIB = 1 << 20
_NO_OVERHEADS = Overheads(0.0, 0.0, 0.0)
_NO_OVERLAP = Overlap(2, 1.0, 1.0)
"""Until passes from disk tell."""
_OVERLAP_NBYTES, _BESIDE_BLOCKS = 64 * _MIB, 8
_BYTES_PER_POINT = 96 * _MIB
_READ_AGAIN_NBYTES = 384 * _MIB
"""In which all reads lie: more than a drive's own memory holds of what was read, and little to read once."""
_MAX_BLOCKS = 256
"""Of reads that go on, GOING_ON_READS at least: until the first are there and while the last are read alone the disk is
not as busy as between, and a layer's reads have that added."""
_IN_FLIGHT = 4
_BURSTS = 5
_LARGE_BLOCK = 12 * _MIB
"""Read in pieces, as large bundles are, and checked whole."""
_BESIDE_READS = ("bf16", "int4")
"""Formats of experts that are computed beside reads: their shares differ by moment more than by format."""
_BETWEEN_READS = "bf16"
_RESIDENT_TOKENS = 32
"""Of an expert of a prompt that is computed beside reads, with others in one call."""
LARGE_ROWS, SMALL_ROWS = 2048, 256
"""Of linear layers."""


def measure_machine(
    subjects: Subjects,
    machine: Machine,
    free_nbytes: int,
    *,
    effort: Effort = FULL,
    say: Callable[[str], None] = lambda _what: None,
) -> HardwareProfile:
    """Measure all but accelerators; `measure_accelerator` adds one.

    Args:
        subjects: the runtime.
        machine: what it runs on.
        free_nbytes: of the disk.
        effort: FULL or QUICK.
        say: told what is being measured.
    """
    formats = [name for name in subjects.formats if effort.formats is None or name in effort.formats]
    experts = {name: expert_points(subjects, name, effort.tokens, several) for name in formats}
    linears = {name: linear_points(subjects, name, effort.tokens, LARGE_ROWS, SMALL_ROWS) for name in formats}
    blocks = {name: _block_points(name) for name in KV_FORMATS if name != "fp16"}
    found = Found()
    budget_s = effort.call_s / effort.rounds
    # A model reads its experts again and again, and most of that time none of them for the first time.
    first_bytes_per_s = subjects.read_first(int(effort.share_of_reads * _READ_AGAIN_NBYTES))
    for number in range(effort.rounds):
        say(f"kernels and disk, round {number + 1} of {effort.rounds}")
        for name in formats:
            found.time_products((*experts[name], *linears[name]), budget_s)
            if name in _BESIDE_READS:
                _read_beside_kernels(found, subjects, name, effort)
        found.time_attention(_ATTENTION, subjects.attention, budget_s)
        for tokens in (1, SMALL_PROMPT_TOKENS):
            found.time(_small_pass_of(tokens), subjects.small_pass(tokens), budget_s)
        for name, points in blocks.items():
            found.time_attention(points, partial(_one_token, subjects, name), budget_s)
        found.note("memory", subjects.stream())
        _read(found, subjects, effort)
    bandwidth = found.median("memory")
    cpu = Compute(
        available_ram_nbytes(),
        bandwidth,
        found.curves(experts),
        found.curves(linears),
        found.attention(_ATTENTION, bandwidth),
        _NO_OVERHEADS,
        blocks=found.block_speeds({name: [one.what for one in points] for name, points in blocks.items()}, bandwidth),
        small_step_s=found.seconds(_small_pass_of(1)),
        small_prompt_s=found.seconds(_small_pass_of(SMALL_PROMPT_TOKENS)),
    )
    provenance = Provenance("measured", machine.describe(), machine.fingerprint, now(), machine.versions)
    disk = _disk(found, effort, free_nbytes, first_bytes_per_s)
    profile = HardwareProfile("this machine", cpu, None, None, None, 0, disk, provenance)
    say("forward passes")
    plain = subjects.passes(profile, None)
    packed = subjects.passes(profile, PACKED) if effort.packed_passes and PACKED in formats else None
    return replace(
        profile,
        cpu=replace(cpu, overheads=plain.overheads, packed_overheads=None if packed is None else packed.overheads),
        disk=replace(disk, many=plain.many),
        provenance=replace(provenance, notes=found.told()),
    )


def _small_pass_of(tokens: int) -> str:
    return f"passes of {tokens} tokens through a small model"


def several(tokens: int) -> int:
    """Experts of a call, so that calls with few and with many tokens are long enough and none takes long. What calls of
    many tokens take in Python must be little of them: a layer's experts share one.
    """
    return 8 if tokens <= 32 else 4 if tokens <= 96 else 2


PROMPT_ATTENTION = (64, 512)
"""New tokens, of wide heads."""

_ATTENTION = (
    AttentionPoint("attention, 64 cached", 1, 64),
    AttentionPoint("attention, 4096 cached", 1, 4096),
    AttentionPoint("attention, 4096 cached, narrow heads", 1, 4096, narrow=True),
    *(AttentionPoint(f"attention, {new_tokens} new", new_tokens, 0) for new_tokens in PROMPT_ATTENTION),
    AttentionPoint("attention, 512 new, narrow heads", 512, 0, narrow=True),
)
"""One token beside few and many cached ones, and some and many tokens at once."""

_IN_BLOCKS = (1024, False), (16384, False), (16384, True)
"""Cached tokens of one sequence, and whether heads are narrow."""


def _block_points(format: str) -> tuple[AttentionPoint, ...]:
    return tuple(
        AttentionPoint(
            f"attention to {format} blocks, {cached} cached{', narrow heads' if narrow else ''}", 1, cached, narrow
        )
        for cached, narrow in _IN_BLOCKS
    )


def _one_token(subjects: Subjects, format: str, new_tokens: int, cached_tokens: int, *, narrow: bool) -> Attention:
    """Attention to blocks as `Found.time_attention` asks for it: of one new token."""
    assert new_tokens == 1, "there is no other"
    return subjects.block_attention(format, cached_tokens, narrow=narrow)


def _read(found: Found, subjects: Subjects, effort: Effort) -> None:
    """A round of the disk: each point, bursts, and one small read."""
    for block in effort.blocks:
        blocks = int(min(max(effort.share_of_reads * _BYTES_PER_POINT // block, GOING_ON_READS), _MAX_BLOCKS))
        for depth in effort.depths:
            found.note(_point_of(block, depth), blocks * block / subjects.read(block, depth, blocks))
    for block in (*effort.blocks, _LARGE_BLOCK):
        for _ in range(_BURSTS):
            for reads in (FEW_READS, BURST_READS):
                found.note(_burst_of(block, reads), reads * block / subjects.read(block, _IN_FLIGHT, reads))
    found.note("between", subjects.between_reads(partial(subjects.read, _MIB, _IN_FLIGHT, BURST_READS), _BETWEEN_READS))
    found.note("latency", min(subjects.read(4096, 1, 1) for _ in range(8)))


def _read_beside_kernels(found: Found, subjects: Subjects, format: str, effort: Effort) -> None:
    block = effort.blocks[-1]
    blocks = int(max(effort.share_of_reads * _OVERLAP_NBYTES // block, _BESIDE_BLOCKS))

    def read() -> float:
        return subjects.read(block, _IN_FLIGHT, blocks)

    for _ in range(2):
        for tokens in (1, _RESIDENT_TOKENS):
            # Alone right before: only what lies close together can be compared.
            alone_s = read()
            beside_s, kernels = subjects.beside_kernels(read, format, 1 if tokens == 1 else several(tokens), tokens)
            found.note(_speed_beside(tokens), blocks * block / alone_s)
            found.note(_reads_beside(tokens), alone_s / beside_s)
            found.note(_kernels_beside(tokens), kernels)


def _speed_beside(tokens: int) -> str:
    return f"speed of reads beside kernels of {tokens} tokens"


def _reads_beside(tokens: int) -> str:
    return f"reads beside kernels of {tokens} tokens"


def _kernels_beside(tokens: int) -> str:
    return f"kernels of {tokens} tokens beside reads"


def _beside_each_other(found: Found, tokens: int) -> Overlap:
    reads, kernels = (min(1.0, found.median(what)) for what in (_reads_beside(tokens), _kernels_beside(tokens)))
    return Overlap(tokens, reads, min(1.0, max(kernels, 1 - reads)), found.median(_speed_beside(tokens)))


def _burst_of(block: int, reads: int) -> str:
    return f"bursts of {reads} of {block}"


def _point_of(block: int, depth: int) -> str:
    return f"reads of {block}, {depth} in flight"


def _disk(found: Found, effort: Effort, free_nbytes: int, first_bytes_per_s: float) -> Disk:
    points = tuple(
        DiskPoint(block, depth, found.median(_point_of(block, depth)))
        for block in effort.blocks
        for depth in effort.depths
    )
    short, bursts = (
        tuple(
            DiskPoint(block, _IN_FLIGHT, found.median(_burst_of(block, reads)))
            for block in (*effort.blocks, _LARGE_BLOCK)
        )
        for reads in (FEW_READS, BURST_READS)
    )
    few, resident = (_beside_each_other(found, tokens) for tokens in (1, _RESIDENT_TOKENS))
    between = min(1.0, found.median("between"))
    latency_s = min(found.repeats["latency"])
    return Disk(points, bursts, latency_s, few, _NO_OVERLAP, free_nbytes, between, short, first_bytes_per_s, resident)
