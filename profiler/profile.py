"""The measurement of a machine: memory, disk, kernels by format and tokens, attention, overheads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from placement.curves import TokenCurve, fit_curve
from placement.hardware_profile import (
    AttentionSpeed,
    Compute,
    Disk,
    DiskPoint,
    FormatCurve,
    HardwareProfile,
    Overheads,
    Provenance,
)
from profiler.machine import Machine, now
from profiler.memory import available_ram_nbytes
from profiler.subjects import Product, Subjects
from profiler.timing import Timing, measure

_MIB = 1 << 20
_NO_OVERHEADS = Overheads(0.0, 0.0, 0.0)
_BYTES_PER_POINT = 96 * _MIB
_PACKED = "int4"
"""Stands for all packed formats in whole passes; what differs is in the curves."""
_MIN_BLOCKS, _MAX_BLOCKS = 8, 256


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens: numbers of tokens of curves.
        call_s: budget of one point of a curve.
        blocks: sizes of reads, in bytes.
        depths: reads in flight.
        share_of_reads: of the bytes that a point of the disk reads otherwise.
        formats: in which kernels are measured; None for all.
        packed_passes: whether whole passes are measured with packed weights too.
    """

    tokens: tuple[int, ...]
    call_s: float
    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    share_of_reads: float
    formats: tuple[str, ...] | None = None
    packed_passes: bool = True


FULL = Effort((1, 2, 4, 8, 16, 32, 128, 512), 0.1, (128 << 10, _MIB, 4 * _MIB), (1, 2, 4), 1.0)
QUICK = Effort(
    (1, 8, 16, 128), 0.04, (512 << 10, 4 * _MIB), (1, 4), 0.25, ("bf16", "int8", "int4"), packed_passes=False
)


@dataclass
class _Notes:
    """What did not become stable."""

    timings: int = 0
    unstable: dict[str, float] = field(default_factory=dict)

    def timing(self, what: str, found: Timing) -> float:
        self.timings += 1
        if not found.stable:
            self.unstable[what] = found.spread
        return found.seconds

    def told(self) -> tuple[str, ...]:
        if not self.unstable:
            return ()
        worst = max(self.unstable, key=self.unstable.__getitem__)
        return (
            f"{len(self.unstable)} of {self.timings} timings did not become stable; the faster half of the repeats lay "
            f"apart most for {worst}: {self.unstable[worst]:.0%}",
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
    notes = _Notes()
    say("memory")
    bandwidth = subjects.stream()
    say("expert kernels")
    formats = [name for name in subjects.formats if effort.formats is None or name in effort.formats]
    experts = tuple(FormatCurve(name, _experts(subjects, name, effort, notes)) for name in formats)
    say("linear layers")
    linears = tuple(FormatCurve(name, _linears(subjects, name, effort, notes)) for name in formats)
    say("attention")
    attention = _attention(subjects, bandwidth, effort, notes)
    say("disk")
    disk = _disk(subjects, free_nbytes, effort)
    cpu = Compute(available_ram_nbytes(), bandwidth, _with_fp16(experts), _with_fp16(linears), attention, _NO_OVERHEADS)
    provenance = Provenance("measured", machine.describe(), machine.fingerprint, now(), machine.versions)
    profile = HardwareProfile("this machine", cpu, None, None, None, 0, disk, provenance)
    say("forward passes")
    overheads = subjects.overheads(profile, None)
    packed = subjects.overheads(profile, _PACKED) if effort.packed_passes and _PACKED in formats else None
    gpu = ("a GPU is there; it is not measured, because the runtime does not use it yet",) if machine.gpus else ()
    return replace(
        profile,
        cpu=replace(cpu, overheads=overheads, packed_overheads=packed),
        provenance=replace(provenance, notes=(*notes.told(), *gpu)),
    )


def _experts(subjects: Subjects, format: str, effort: Effort, notes: _Notes) -> TokenCurve:
    """From calls of one and of several experts with one token, and of several with more."""

    def several(tokens: int) -> Product:
        return subjects.experts(format, 8 if tokens <= 16 else 2, tokens)

    few = subjects.experts(format, 1, 1)
    return _curve(f"experts in {format}", few, several, effort, notes)


def _linears(subjects: Subjects, format: str, effort: Effort, notes: _Notes) -> TokenCurve:
    few = subjects.linear(format, 256, 1)
    return _curve(
        f"linear layers in {format}", few, lambda tokens: subjects.linear(format, 2048, tokens), effort, notes
    )


def _curve(what: str, small: Product, large: Callable[[int], Product], effort: Effort, notes: _Notes) -> TokenCurve:
    """The fit of one small product at one token and large ones at every number of tokens, scaled to one size."""
    budget = effort.call_s
    samples = [(small.weights, 1, notes.timing(f"{what}, small", measure(small.run, budget_s=budget)))]
    size = 0
    for tokens in effort.tokens:
        product = large(tokens)
        size = size or product.weights
        seconds = notes.timing(f"{what}, {tokens} tokens", measure(product.run, budget_s=budget))
        samples.append((size, tokens, seconds * size / product.weights))
    return fit_curve(samples)


def _with_fp16(curves: tuple[FormatCurve, ...]) -> tuple[FormatCurve, ...]:
    """fp16 is not measured: its bytes and its ways through the kernels are bf16's."""
    return (*curves, *(FormatCurve("fp16", one.curve) for one in curves if one.format == "bf16"))


def _attention(subjects: Subjects, bandwidth: float, effort: Effort, notes: _Notes) -> AttentionSpeed:
    """One token beside few and many cached ones, and many tokens at once; what it reads it reads at the bandwidth."""
    short, long = subjects.attention(1, 64), subjects.attention(1, 4096)
    few = notes.timing("attention, 64 cached", measure(short.run, budget_s=effort.call_s))
    many = notes.timing("attention, 4096 cached", measure(long.run, budget_s=effort.call_s))
    few_flops_per_s = (long.flops - short.flops) / max(many - few, 1e-9)
    call_s = max(0.0, few - short.flops / few_flops_per_s)
    prompt = subjects.attention(512, 0)
    seconds = notes.timing("attention, 512 new", measure(prompt.run, budget_s=effort.call_s))
    return AttentionSpeed(call_s, bandwidth, few_flops_per_s, prompt.flops / max(seconds - call_s, 1e-9))


def _disk(subjects: Subjects, free_nbytes: int, effort: Effort) -> Disk:
    points = []
    for block in effort.blocks:
        blocks = int(min(max(effort.share_of_reads * _BYTES_PER_POINT // block, _MIN_BLOCKS), _MAX_BLOCKS))
        for depth in effort.depths:
            seconds = min(subjects.read(block, depth, blocks) for _ in range(2))
            points.append(DiskPoint(block, depth, blocks * block / seconds))
    block, depth = effort.blocks[-1], 4
    alone = [subjects.read(block, depth, _MIN_BLOCKS * 4) for _ in range(3)]
    beside = [subjects.beside_kernels(lambda: subjects.read(block, depth, _MIN_BLOCKS * 4)) for _ in range(3)]
    share = min(1.0, sorted(alone)[1] / sorted(beside)[1])
    latency_s = min(subjects.read(4096, 1, 1) for _ in range(20))
    return Disk(tuple(points), latency_s, share, free_nbytes)
