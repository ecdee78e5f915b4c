"""How much of a machine is measured."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens: numbers of tokens of curves.
        call_s: budget of one point of a curve, in all rounds.
        blocks: sizes of reads, in bytes.
        depths: reads in flight.
        share_of_reads: of the bytes that a point of the disk reads otherwise.
        pinned_nbytes: host memory that is locked on trial.
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
    pinned_nbytes: int
    formats: tuple[str, ...] | None = None
    packed_passes: bool = True
    rounds: int = 3


FULL = Effort((1, 2, 4, 8, 16, 32, 48, 64, 96, 192, 512), 0.09, (128 << 10, _MIB, 4 * _MIB), (1, 2, 4), 1.0, 4 << 30)
QUICK = Effort(
    (1, 8, 32, 128), 0.04, (512 << 10, 4 * _MIB), (1, 4), 0.25, 1 << 30, ("bf16", "int8", "int4"), packed_passes=False,
    rounds=1,
)  # fmt: skip
