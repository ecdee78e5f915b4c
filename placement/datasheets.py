"""Machines that are not at hand: profiles from datasheets, for planning ahead.

Peak figures are the makers' (bandwidths, dense 16-bit tensor flops with fp32 sums, sizes). What software reaches of
them is assumed, by the shares below, which are typical of this runtime's own measurements on CPUs and of published
kernels on GPUs. A prediction from such a profile says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from formats.elements import ELEMENT_FORMATS
from formats.packed import PACKED_FORMATS
from placement.curves import roofline
from placement.disk import Disk, DiskPoint, Overlap
from placement.hardware_profile import (
    AttentionSpeed,
    Compute,
    FormatCurve,
    HardwareProfile,
    Link,
    Overheads,
    Provenance,
)

_GIB = 1 << 30
_MIB = 1 << 20

_Sheet = TypeVar("_Sheet")

READ_SHARE = 0.80
"""Of a memory's peak that kernels for few tokens reach."""
FLOPS_SHARE = 0.50
"""Of peak flops that kernels for many tokens reach."""
LINK_SHARE = 0.85
"""Of a link's peak that pinned copies of megabytes reach."""
CONTENDED_SHARE = 0.75
"""Of a link's speed that is left while CPU kernels read the same memory."""
DISK_SHARE = 0.90
"""Of a drive's sequential peak that direct reads of megabytes, several in flight, reach."""

READS_BESIDE_KERNELS_SHARE = 0.95
"""Of a drive's speed that is left while CPU kernels run."""
KERNELS_BESIDE_READS_SHARE = 1.0
"""Of the kernels' speed that is left while a drive reads by itself into memory: of tens of GB/s it takes a few."""

DEFAULT_RAM_NBYTES = 64 * _GIB

_PASS_S = 2e-3
"""Once a pass, wherever layers are: most of it is Python's."""

VRAM_KEPT = 0.92
"""Of the accelerator's memory that a program may use: the display, the driver and the context take the rest."""
RAM_KEPT = 0.90


@dataclass(frozen=True)
class Gpu:
    """An accelerator's datasheet: bytes, bytes per second, 16-bit tensor flops per second, and its link."""

    memory_nbytes: int
    bytes_per_s: float
    flops_per_s: float
    link: str


@dataclass(frozen=True)
class Cpu:
    """A class of processors: host memory bandwidth and the flops of the runtime's kernels at many tokens."""

    bytes_per_s: float
    bf16_flops_per_s: float
    int8_flops_per_s: float


GPUS: Mapping[str, Gpu] = {
    "rtx3060": Gpu(12 * _GIB, 360e9, 25e12, "pcie4"),
    "rtx3090": Gpu(24 * _GIB, 936e9, 71e12, "pcie4"),
    "rtx4060ti": Gpu(16 * _GIB, 288e9, 44e12, "pcie4x8"),
    "rtx4070": Gpu(12 * _GIB, 504e9, 58e12, "pcie4"),
    "rtx4080": Gpu(16 * _GIB, 717e9, 97e12, "pcie4"),
    "rtx4090": Gpu(24 * _GIB, 1008e9, 165e12, "pcie4"),
    "rtx5070ti": Gpu(16 * _GIB, 896e9, 88e12, "pcie5"),
    "rtx5080": Gpu(16 * _GIB, 960e9, 113e12, "pcie5"),
    "rtx5090": Gpu(32 * _GIB, 1792e9, 210e12, "pcie5"),
}

LINKS: Mapping[str, float] = {
    "pcie3": 15.75e9,
    "pcie4x8": 15.75e9,
    "pcie4": 31.5e9,
    "pcie5x8": 31.5e9,
    "pcie5": 63.0e9,
}
"""Bytes per second in one direction, 16 lanes unless it says otherwise."""

DRIVES: Mapping[str, float] = {"sata": 0.55e9, "gen3": 3.5e9, "gen4": 7.0e9, "gen5": 14.0e9, "raid0-gen4": 14.0e9}
"""Sequential reads in bytes per second, by class."""

CPUS: Mapping[str, Cpu] = {
    "ddr4-desktop": Cpu(51.2e9, 0.6e12, 1.2e12),
    "ddr5-desktop": Cpu(89.6e9, 1.0e12, 2.4e12),
    "ddr4-server": Cpu(204.8e9, 2.0e12, 4.0e12),
    "ddr5-server": Cpu(307.2e9, 4.0e12, 12.0e12),
}
"""Two channels of DDR4-3200 or DDR5-5600, eight of each; kernels with AVX2 or AVX-512."""


def datasheet(
    *,
    gpu: str | None = None,
    link: str | None = None,
    cpu: str = "ddr5-desktop",
    drive: str = "gen4",
    ram_nbytes: int = DEFAULT_RAM_NBYTES,
    drive_nbytes: int = 2000 * 10**9,
) -> HardwareProfile:
    """A machine put together from datasheets.

    Args:
        gpu: a key of GPUS, None for a machine without.
        link: a key of LINKS, None for the accelerator's own.
        cpu: a key of CPUS.
        drive: a key of DRIVES.
        ram_nbytes: host memory in the machine, of which RAM_KEPT is for the runtime.
        drive_nbytes: free bytes of the drive.

    Raises:
        ValueError: an unknown name.
    """
    processor = _lookup(CPUS, cpu, "processor class")
    disk = _disk(_lookup(DRIVES, drive, "drive class"), drive_nbytes)
    card = None if gpu is None else _lookup(GPUS, gpu, "GPU")
    link_name = link or (card.link if card else None)
    speed = _lookup(LINKS, link_name, "link") if card and link_name else 0.0
    parts = [f"{gpu} ({link_name})"] if card else []
    name = ", ".join([*parts, f"{cpu} with {ram_nbytes / _GIB:.0f} GiB", f"{drive} drive"])
    copies = Link(10e-6, LINK_SHARE * speed, LINK_SHARE * CONTENDED_SHARE * speed) if card else None
    return HardwareProfile(
        name=name,
        cpu=_cpu(processor, ram_nbytes),
        gpu=_gpu(card) if card else None,
        to_gpu=copies,
        from_gpu=copies,
        pinned_nbytes=ram_nbytes // 2 if card else 0,
        disk=disk,
        provenance=Provenance("datasheet", name, f"datasheet {name}", "", notes=("from datasheets, not measured",)),
    )


def bits_of(format: str) -> float:
    """Bits of a weight in a format, scales included."""
    if format in ELEMENT_FORMATS:
        return float(ELEMENT_FORMATS[format].bits)
    packed = PACKED_FORMATS[format]
    return packed.bits + 8 * packed.scale_nbytes / (packed.group * packed.group_rows)


def _cpu(cpu: Cpu, ram_nbytes: int) -> Compute:
    def curves(call_s: float) -> tuple[FormatCurve, ...]:
        made = []
        for format in (*ELEMENT_FORMATS, *PACKED_FORMATS):
            flops = cpu.int8_flops_per_s if format in ("int8", "int4", "mxfp4") else cpu.bf16_flops_per_s
            flops *= FLOPS_SHARE * (0.5 if format == "fp32" else 1.0)
            made.append(FormatCurve(format, roofline(bits_of(format), READ_SHARE * cpu.bytes_per_s, flops, call_s)))
        return tuple(made)

    return Compute(
        memory_nbytes=int(RAM_KEPT * ram_nbytes),
        memory_bytes_per_s=READ_SHARE * cpu.bytes_per_s,
        experts=curves(20e-6),
        linears=curves(10e-6),
        attention=AttentionSpeed(
            30e-6, READ_SHARE * cpu.bytes_per_s, FLOPS_SHARE * cpu.bf16_flops_per_s, FLOPS_SHARE * cpu.bf16_flops_per_s
        ),
        overheads=Overheads(_PASS_S, 4e-4, 40 / cpu.bytes_per_s),
    )


def _gpu(gpu: Gpu) -> Compute:
    def curves(call_s: float) -> tuple[FormatCurve, ...]:
        rates = READ_SHARE * gpu.bytes_per_s, FLOPS_SHARE * gpu.flops_per_s
        return tuple(
            FormatCurve(format, roofline(bits_of(format), *rates, call_s))
            for format in (*ELEMENT_FORMATS, *PACKED_FORMATS)
        )

    return Compute(
        memory_nbytes=int(VRAM_KEPT * gpu.memory_nbytes),
        memory_bytes_per_s=READ_SHARE * gpu.bytes_per_s,
        experts=curves(10e-6),
        linears=curves(4e-6),
        attention=AttentionSpeed(
            10e-6, READ_SHARE * gpu.bytes_per_s, FLOPS_SHARE * gpu.flops_per_s, FLOPS_SHARE * gpu.flops_per_s
        ),
        overheads=Overheads(_PASS_S, 6e-5, 40 / gpu.bytes_per_s),
    )


def _disk(bytes_per_s: float, free_nbytes: int) -> Disk:
    latency_s = 80e-6
    peak = DISK_SHARE * bytes_per_s
    points = tuple(
        DiskPoint(block, depth, min(peak, depth * block / (latency_s + block / peak)))
        for block in (64 << 10, _MIB // 4, _MIB, 4 * _MIB, 16 * _MIB)
        for depth in (1, 2, 4, 8, 16)
    )
    few, many = (Overlap(tokens, READS_BESIDE_KERNELS_SHARE, KERNELS_BESIDE_READS_SHARE) for tokens in (1, 32))
    return Disk(points, (), latency_s, few, many, free_nbytes)


def _lookup(known: Mapping[str, _Sheet], name: str, what: str) -> _Sheet:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return known[name]
