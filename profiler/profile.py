"""The measurement of a machine: memory, disk, kernels by format and tokens, attention, overheads."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from formats.packed import PACKED_FORMATS
from placement.curves import Sample, TokenCurve, fit_curve
from placement.disk import BURST_READS, FEW_READS, Disk, DiskPoint, Overlap
from placement.hardware_profile import (
    AttentionSpeed,
    Compute,
    FormatCurve,
    HardwareProfile,
    Overheads,
    Provenance,
)
from profiler.machine import Machine, now
from profiler.memory import available_ram_nbytes
from profiler.subjects import Product, Subjects
from profiler.timing import Timing, repeated

_MIB = 1 << 20
_NO_OVERHEADS = Overheads(0.0, 0.0, 0.0)
_NO_OVERLAP = Overlap(2, 1.0, 1.0)
"""Until passes from disk tell."""
_OVERLAP_NBYTES = 64 * _MIB
_BYTES_PER_POINT = 96 * _MIB
_PACKED = "int4"
"""Stands for all packed formats in whole passes; what differs is in the curves."""
_MIN_BLOCKS, _MAX_BLOCKS = 8, 256
_FEWEST = 2
_IN_FLIGHT = 4
_BURSTS = 5
_LARGE_BLOCK = 12 * _MIB
"""Read in pieces, as large bundles are, and checked whole."""
_BESIDE_READS = ("bf16", "int4")
"""Formats of experts that are computed beside reads: their shares differ by moment more than by format."""
_BETWEEN_READS = "bf16"
_NARROW_COUNT, _NARROW_TOKENS = 8, 32


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens: numbers of tokens of curves.
        call_s: budget of one point of a curve, in all rounds.
        blocks: sizes of reads, in bytes.
        depths: reads in flight.
        share_of_reads: of the bytes that a point of the disk reads otherwise.
        formats: in which kernels are measured; None for all.
        packed_passes: whether whole passes are measured with packed weights too.
        rounds: in which everything but whole passes is measured, one after the other: others on the machine slow it
            down for seconds, and then only some repeats of each.
    """

    tokens: tuple[int, ...]
    call_s: float
    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    share_of_reads: float
    formats: tuple[str, ...] | None = None
    packed_passes: bool = True
    rounds: int = 3


FULL = Effort((1, 2, 4, 8, 16, 32, 128, 512), 0.09, (128 << 10, _MIB, 4 * _MIB), (1, 2, 4), 1.0)
QUICK = Effort(
    (1, 8, 32, 128), 0.04, (512 << 10, 4 * _MIB), (1, 4), 0.25, ("bf16", "int8", "int4"), packed_passes=False,
    rounds=1,
)  # fmt: skip


@dataclass(frozen=True)
class _Point:
    """A point of a curve.

    Attributes:
        what: in words.
        tokens: of the product.
        make: the product.
    """

    what: str
    tokens: int
    make: Callable[[], Product]


@dataclass
class _Found:
    """What the rounds brought: repeats of each timing, and sizes of products and of attention."""

    repeats: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Weights of a product, entries of a token, and experts."""
    flops: dict[str, float] = field(default_factory=dict)

    def time(self, what: str, run: Callable[[], object], budget_s: float, calls: int = 1) -> None:
        """Repeat a run of some calls: seconds of one of these."""
        seconds = repeated(run, budget_s=budget_s, fewest=_FEWEST)
        self.repeats.setdefault(what, []).extend(each / calls for each in seconds)

    def note(self, what: str, value: float) -> None:
        self.repeats.setdefault(what, []).append(value)

    def seconds(self, what: str) -> float:
        return Timing.of(self.repeats[what]).seconds

    def median(self, what: str) -> float:
        return statistics.median(self.repeats[what])

    def told(self, timed: list[str]) -> tuple[str, ...]:
        unstable = {what: found.spread for what in timed if not (found := Timing.of(self.repeats[what])).stable}
        if not unstable:
            return ()
        worst = max(unstable, key=unstable.__getitem__)
        return (
            f"{len(unstable)} of {len(timed)} timings did not become stable; the faster half of the repeats lay "
            f"apart most for {worst}: {unstable[worst]:.0%}",
        )


def measure_machine(
    subjects: Subjects,
    machine: Machine,
    free_nbytes: int,
    *,
    effort: Effort = FULL,
    say: Callable[[str], None] = lambda _what: None,
) -> HardwareProfile:
    """Measure.

    Args:
        subjects: the runtime.
        machine: what it runs on.
        free_nbytes: of the disk.
        effort: FULL or QUICK.
        say: told what is being measured.
    """
    formats = [name for name in subjects.formats if effort.formats is None or name in effort.formats]
    experts = {name: _expert_points(subjects, name, effort) for name in formats}
    linears = {name: _linear_points(subjects, name, effort) for name in formats}
    found = _Found()
    for number in range(effort.rounds):
        say(f"kernels and disk, round {number + 1} of {effort.rounds}")
        for name in formats:
            for point in (*experts[name], *linears[name]):
                product = point.make()
                found.sizes[point.what] = product.weights, product.entries, product.items
                found.time(point.what, product.run, effort.call_s / effort.rounds, product.calls)
            if name in _BESIDE_READS:
                _read_beside_kernels(found, subjects, name, effort)
        _time_attention(found, subjects, effort)
        found.note("memory", subjects.stream())
        _read(found, subjects, effort)
    timed = [what for what in found.repeats if what in found.sizes or what.startswith("attention")]
    bandwidth = found.median("memory")
    cpu = Compute(
        available_ram_nbytes(),
        bandwidth,
        _with_fp16(tuple(FormatCurve(name, _fit(found, experts[name])) for name in formats)),
        _with_fp16(tuple(FormatCurve(name, _fit(found, linears[name])) for name in formats)),
        _attention(found, bandwidth),
        _NO_OVERHEADS,
    )
    provenance = Provenance("measured", machine.describe(), machine.fingerprint, now(), machine.versions)
    disk = _disk(found, effort, free_nbytes)
    profile = HardwareProfile("this machine", cpu, None, None, None, 0, disk, provenance)
    say("forward passes")
    plain = subjects.passes(profile, None)
    packed = subjects.passes(profile, _PACKED) if effort.packed_passes and _PACKED in formats else None
    gpu = ("a GPU is there; it is not measured, because the runtime does not use it yet",) if machine.gpus else ()
    return replace(
        profile,
        cpu=replace(cpu, overheads=plain.overheads, packed_overheads=None if packed is None else packed.overheads),
        disk=replace(disk, many=plain.many),
        provenance=replace(provenance, notes=(*found.told(timed), *gpu)),
    )


def _expert_points(subjects: Subjects, format: str, effort: Effort) -> list[_Point]:
    """Calls of one and of several experts with one token, and of several with more; also of narrow ones, of which each
    expert takes some time whatever its size, and in packed formats much of it to round what enters and leaves them.
    """
    what = f"experts in {format}"
    narrow = {
        tokens: partial(subjects.experts, format, _NARROW_COUNT, tokens, narrow=True) for tokens in (1, _NARROW_TOKENS)
    }
    return [
        _Point(f"{what}, small", 1, partial(subjects.experts, format, 1, 1)),
        *(
            _Point(f"{what}, {tokens} tokens", tokens, partial(subjects.experts, format, several(tokens), tokens))
            for tokens in effort.tokens
        ),
        _Point(f"{what}, narrow, one token", 1, narrow[1]),
        *([_Point(f"{what}, narrow", _NARROW_TOKENS, narrow[_NARROW_TOKENS])] if format in PACKED_FORMATS else []),
    ]


def several(tokens: int) -> int:
    """Experts of a call, so that calls with few and with many tokens are long enough and none takes long."""
    return 8 if tokens <= 16 else 2


def _linear_points(subjects: Subjects, format: str, effort: Effort) -> list[_Point]:
    what = f"linear layers in {format}"
    large = [
        _Point(f"{what}, {tokens} tokens", tokens, partial(subjects.linear, format, 2048, tokens))
        for tokens in effort.tokens
    ]
    # Small ones last: weights of one size are made at a time.
    small = [
        _Point(f"{what}, small, {tokens} tokens", tokens, partial(subjects.linear, format, 256, tokens))
        for tokens in (1, effort.tokens[-1])
    ]
    return [*large, *small]


def _fit(found: _Found, points: list[_Point]) -> TokenCurve:
    """The fit of small products and the large ones."""
    samples = []
    for point in points:
        weights, entries, items = found.sizes[point.what]
        samples.append(Sample(weights, point.tokens, found.seconds(point.what), entries, items))
    return fit_curve(samples)


def _with_fp16(curves: tuple[FormatCurve, ...]) -> tuple[FormatCurve, ...]:
    """fp16 is not measured: its bytes and its ways through the kernels are bf16's."""
    return (*curves, *(FormatCurve("fp16", one.curve) for one in curves if one.format == "bf16"))


_ATTENTION = {
    "attention, 64 cached": (1, 64),
    "attention, 4096 cached": (1, 4096),
    "attention, 64 new": (64, 0),
    "attention, 512 new": (512, 0),
}


def _time_attention(found: _Found, subjects: Subjects, effort: Effort) -> None:
    """One token beside few and many cached ones, and some and many tokens at once."""
    for what, (new, cached) in _ATTENTION.items():
        attention = subjects.attention(new, cached)
        found.flops[what] = attention.flops
        found.time(what, attention.run, effort.call_s / effort.rounds)


def _attention(found: _Found, bandwidth: float) -> AttentionSpeed:
    """What attention reads it reads at the bandwidth."""
    one, short, prompt, long = ((found.flops[what], found.seconds(what)) for what in _ATTENTION)
    call_s, few_flops_per_s = _line(one, short)
    prompt_call_s, flops_per_s = _line(prompt, long)
    return AttentionSpeed(call_s, bandwidth, few_flops_per_s, flops_per_s, prompt_call_s)


def _line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(seconds of a call, flops per second) from (flops, seconds) of a small and of a large call."""
    flops_per_s = (large[0] - small[0]) / max(large[1] - small[1], 1e-9)
    return max(0.0, small[1] - small[0] / flops_per_s), flops_per_s


def _read(found: _Found, subjects: Subjects, effort: Effort) -> None:
    """A round of the disk: each point, bursts, and one small read."""
    for block in effort.blocks:
        blocks = int(min(max(effort.share_of_reads * _BYTES_PER_POINT // block, _MIN_BLOCKS), _MAX_BLOCKS))
        for depth in effort.depths:
            found.note(_point_of(block, depth), blocks * block / subjects.read(block, depth, blocks))
    for block in (*effort.blocks, _LARGE_BLOCK):
        for _ in range(_BURSTS):
            for reads in (FEW_READS, BURST_READS):
                found.note(_burst_of(block, reads), reads * block / subjects.read(block, _IN_FLIGHT, reads))
    found.note("between", subjects.between_reads(partial(subjects.read, _MIB, _IN_FLIGHT, BURST_READS), _BETWEEN_READS))
    found.note("latency", min(subjects.read(4096, 1, 1) for _ in range(8)))


def _read_beside_kernels(found: _Found, subjects: Subjects, format: str, effort: Effort) -> None:
    block = effort.blocks[-1]
    blocks = int(max(effort.share_of_reads * _OVERLAP_NBYTES // block, _MIN_BLOCKS))

    def read() -> float:
        return subjects.read(block, _IN_FLIGHT, blocks)

    for _ in range(2):
        # Alone right before: only what lies close together can be compared.
        alone_s = read()
        beside_s, kernels = subjects.beside_kernels(read, format, 1)
        found.note("reads beside kernels", alone_s / beside_s)
        found.note("kernels beside reads", kernels)


def _burst_of(block: int, reads: int) -> str:
    return f"bursts of {reads} of {block}"


def _point_of(block: int, depth: int) -> str:
    return f"reads of {block}, {depth} in flight"


def _disk(found: _Found, effort: Effort, free_nbytes: int) -> Disk:
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
    reads, kernels = (min(1.0, found.median(what)) for what in ("reads beside kernels", "kernels beside reads"))
    few = Overlap(1, reads, min(1.0, max(kernels, 1 - reads)))
    between = min(1.0, found.median("between"))
    return Disk(points, bursts, min(found.repeats["latency"]), few, _NO_OVERLAP, free_nbytes, between, short)
