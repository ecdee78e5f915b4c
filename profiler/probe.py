"""How fast the machine is right now, over what its profile says: about a second, before a run or a measurement.

Shared machines change by a third within seconds: other tenants take memory's bandwidth, the sibling threads of the
cores, or the disk. The probe repeats three of the profile's own measurements: experts of one token, which stream
weights from memory, experts of many tokens, which compute, and reads.
"""

from __future__ import annotations

import statistics
from time import perf_counter

from placement.hardware_profile import HardwareProfile, Speeds
from profiler.profile import MIN_BLOCKS, several
from profiler.subjects import Product, Subjects

PROBE_S = 1.0
_FEW, _MANY = 1, 32
_TURNS = 3


def probe(
    subjects: Subjects,
    profile: HardwareProfile,
    format: str,
    block_nbytes: int = 0,
    in_flight: int = 4,
    seconds: float = PROBE_S,
) -> Speeds:
    """Measure.

    Args:
        subjects: what the profile was measured on.
        profile: what speeds are told in.
        format: of the experts that are computed.
        block_nbytes: of reads; 0 for none.
        in_flight: reads at once.
        seconds: that it may take, about.
    """
    reads = block_nbytes > 0 and profile.disk is not None
    share_s = seconds / _TURNS / (3 if reads else 2)
    products = {tokens: subjects.experts(format, several(tokens), tokens) for tokens in (_FEW, _MANY)}
    repeats: dict[int, list[float]] = {tokens: [] for tokens in products}
    disk: list[float] = []
    for product in products.values():
        product.run()
    for _ in range(_TURNS):
        for tokens, product in products.items():
            repeats[tokens] += _repeats(product, share_s)
        if reads and profile.disk is not None:
            # As many as the profile's points have, which begin and end as slowly.
            seconds_of_reads = subjects.read(block_nbytes, in_flight, MIN_BLOCKS)
            speed = MIN_BLOCKS * block_nbytes / seconds_of_reads
            disk.append(speed / profile.disk.bytes_per_s(block_nbytes, in_flight))
    curve = profile.cpu.expert(format)
    memory, arithmetic = (
        product.calls
        * curve.seconds(product.weights, tokens, 1, product.entries, product.items)
        / statistics.median(repeats[tokens])
        for tokens, product in products.items()
    )
    return Speeds(memory, arithmetic, statistics.median(disk) if disk else 1.0)


def _repeats(product: Product, seconds: float) -> list[float]:
    found: list[float] = []
    began = perf_counter()
    while not found or perf_counter() - began < seconds:
        before = perf_counter()
        product.run()
        found.append(perf_counter() - before)
    return found
