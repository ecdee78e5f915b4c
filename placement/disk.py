"""The disk of the expert store: how fast it reads alone, and how it and the CPU's kernels slow each other down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

FEW_READS, BURST_READS = 2, 8
"""Of bursts that are measured."""

GOING_ON_READS = 48
"""Of which reads that go on are measured, at least: their start is in that speed."""


_LEAST_SHARE = 0.1
"""Of their speed that kernels keep beside however fast reads."""


@dataclass(frozen=True)
class DiskPoint:
    """One measurement: direct reads of `block_nbytes` at random places, `in_flight` at once."""

    block_nbytes: int
    in_flight: int
    bytes_per_s: float


@dataclass(frozen=True)
class Overlap:
    """What reads and the CPU's kernels are left with while both run, as shares of their speeds alone.

    Reads take some of the CPU's time (checksums, copies, and on a virtual machine the host's own work) and of the
    memory's, and kernels take it from them. Together they have no less than either alone, so that both at once never
    take longer than one after the other.

    Attributes:
        tokens: of each expert that the kernels compute.
        reads: of the disk's speed.
        kernels: of the kernels' speed.
        bytes_per_s: of those reads alone; None: of any.
    """

    tokens: int
    reads: float
    kernels: float
    bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 < self.reads <= 1 or not 0 < self.kernels <= 1 or self.together < 1 - 1e-9:
            raise ValueError(f"shares are above 0, at most 1 and together at least 1: {self}")

    @property
    def together(self) -> float:
        """Both shares: 1 where nothing is gained by doing both at once, 2 where neither notices the other."""
        return self.reads + self.kernels

    def beside(self, bytes_per_s: float) -> Overlap:
        """Beside reads that are so fast alone: what they take of kernels is by the byte (checksums, copies, memory), so
        beside reads twice as fast kernels lose twice as much, up to all of the time that reads alone would take.
        """
        if self.bytes_per_s is None:
            return self
        left = 1 - (1 - self.kernels) * bytes_per_s / self.bytes_per_s
        kernels = max(left, min(self.kernels, max(1 - self.reads, _LEAST_SHARE)))
        return Overlap(self.tokens, self.reads, kernels, bytes_per_s)

    def seconds(self, kernels_s: FloatArray, reads_s: FloatArray) -> FloatArray:
        """Seconds of kernels and reads that begin together, from what each takes alone: the one that goes on longer
        has its full speed back once the other is done.
        """
        both = np.minimum(kernels_s / self.kernels, reads_s / self.reads)
        return both + np.maximum(kernels_s - self.kernels * both, reads_s - self.reads * both)


@dataclass(frozen=True)
class Disk:
    """The disk of the expert store.

    Attributes:
        points: by size and number in flight, of reads that go on and on.
        bursts: by size, of the first BURST_READS reads after the disk was idle, as a layer's misses are; large ones are
            read in pieces, as bundles are. Empty: as fast as reads that go on, after `latency_s`.
        short_bursts: likewise of the first FEW_READS; empty: their reads take as long beyond those that go on.
        latency_s: of one small read, from request to data, when the disk is idle.
        few: what is left of reads and kernels while kernels of few tokens run, beside the reads that were measured.
        many: likewise in prompts, as a model's own layers found it: kernels begin and end as experts arrive.
        resident: likewise in prompts while experts that were there before are computed, all in one call: kernels that
            do not sleep leave reads less than those of experts that arrive; None: as `many`.
        free_nbytes: free bytes.
        between: share of their speed that kernels of few tokens have between the reads of one layer and of the next:
            their threads and the cores slept, and whoever read for the machine may be busy still.
        first_bytes_per_s: of large reads of what was not read before. Where a virtual machine's host keeps in its
            memory what it read, all others come faster, and a model reads the same again and again; None: not known.
    """

    points: tuple[DiskPoint, ...]
    bursts: tuple[DiskPoint, ...]
    latency_s: float
    few: Overlap
    many: Overlap
    free_nbytes: int
    between: float = 1.0
    short_bursts: tuple[DiskPoint, ...] = ()
    first_bytes_per_s: float | None = None
    resident: Overlap | None = None

    def __post_init__(self) -> None:
        if not self.points or self.few.tokens >= self.many.tokens:
            raise ValueError("a disk needs measurements, and overlaps for few tokens and for more")
        if not 0 < self.between <= 1:
            raise ValueError(f"a share of speed is above 0 and at most 1: {self.between}")

    def bytes_per_s(self, block_nbytes: int, in_flight: int) -> float:
        """Speed of reads alone.

        Of the points with the nearest number in flight (by ratio).
        """
        depth = min({point.in_flight for point in self.points}, key=lambda d: (abs(math.log(d / max(in_flight, 1))), d))
        return _between([point for point in self.points if point.in_flight == depth], block_nbytes)

    def startup_s(self, nbytes: float, reads: FloatArray, going_on_s: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """Seconds that reads of a layer take more than reads that go on: none is on its way before, they begin and end
        together, and what is read last is checked while none follows.

        Args:
            nbytes: of each.
            reads: [...] how many there are; straight between the bursts that were measured, level below; beyond them
                straight to none at GOING_ON_READS, whose start is in the speed of reads that go on.
            going_on_s: seconds of so many that go on.
        """
        if not self.bursts:
            return np.full_like(reads, self.latency_s)
        counts, found = [], []
        for count, points in ((FEW_READS, self.short_bursts), (BURST_READS, self.bursts)):
            if points:
                burst_s = count * nbytes / _between(points, int(nbytes))
                counts.append(count)
                found.append(max(0.0, burst_s - float(going_on_s(np.array(float(count))))))
        return np.interp(reads, [*counts, GOING_ON_READS], [*found, 0.0])

    def overlapped_bytes_per_s(self, block_nbytes: int, in_flight: int) -> float:
        """Speed of reads while the CPU's kernels of few tokens run."""
        return self.few.reads * self.bytes_per_s(block_nbytes, in_flight)

    def overlap(self, tokens: float, bytes_per_s: float) -> Overlap:
        """What is left of reads that are so fast alone, and of kernels whose experts have so many tokens: straight in
        their logarithm.
        """
        few, many = self.few.beside(bytes_per_s), self.many.beside(bytes_per_s)
        at = math.log(max(tokens, 1.0) / few.tokens) / math.log(many.tokens / few.tokens)
        at = min(max(at, 0.0), 1.0)
        reads, kernels = ((1 - at) * a + at * b for a, b in ((few.reads, many.reads), (few.kernels, many.kernels)))
        return Overlap(max(1, round(tokens)), reads, kernels, bytes_per_s)

    def burst_bytes_per_s(self, block_nbytes: int) -> float:
        """Speed of BURST_READS reads after the disk was idle; of a profile without bursts, of reads that go on."""
        return _between(self.bursts, block_nbytes) if self.bursts else self.bytes_per_s(block_nbytes, BURST_READS)

    def times(self, factor: float, bursts: float | None = None) -> Disk:
        """The disk with reads `factor` times as fast, and bursts of them `bursts` times (None: as much)."""
        of_bursts = factor if bursts is None else bursts
        points, first, short = (
            tuple(DiskPoint(p.block_nbytes, p.in_flight, share * p.bytes_per_s) for p in some)
            for some, share in ((self.points, factor), (self.bursts, of_bursts), (self.short_bursts, of_bursts))
        )
        return replace(self, points=points, bursts=first, short_bursts=short, latency_s=self.latency_s / of_bursts)


def _between(points: Sequence[DiskPoint], block_nbytes: int) -> float:
    """The speed of points of one number in flight: straight in the logarithm of the size, level outside."""
    ordered = sorted((point.block_nbytes, point.bytes_per_s) for point in points)
    if block_nbytes <= ordered[0][0]:
        return ordered[0][1]
    for (small, slow), (large, fast) in itertools.pairwise(ordered):
        if block_nbytes <= large:
            return slow + (fast - slow) * math.log(block_nbytes / small) / math.log(large / small)
    return ordered[-1][1]
