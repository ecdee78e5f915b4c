"""How fast the machine is right now, over what its profile says: about a second, before a run or a measurement.

Shared machines change by a third within seconds: other tenants take memory's bandwidth, the sibling threads of the
cores, or the disk. The probe repeats some of the profile's own measurements: experts of one token, which stream
weights from memory, experts of some tokens, which wait for memory and compute, experts of many, which compute, reads
that go on, and bursts of them. Of many tokens several points of the profile's curve are repeated: each has an error of
its own, which would be taken for the machine's speed.
Of bursts the mean counts: reads that come late now and then hold up a layer, but not reads that go on beside them.
"""

from __future__ import annotations

import statistics
from time import perf_counter

from placement.curves import BETWEEN_TOKENS, MANY_TOKENS
from placement.disk import BURST_READS, GOING_ON_READS
from placement.hardware_profile import HardwareProfile, Speeds
from profiler.profile import several
from profiler.subjects import Product, Subjects

PROBE_S = 1.0
_FEW, _MANY = 1, (MANY_TOKENS, 128)
"""Tokens of an expert: those of the curve's points from so many to so many."""
_TURNS = 3
_BURSTS = 4
"""Of a turn."""


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
    known = profile.disk if block_nbytes > 0 else None
    share_s = seconds / _TURNS / (3 if known is None else 4)
    curve = profile.cpu.expert(format)
    many = [tokens for tokens in curve.tokens if _MANY[0] <= tokens <= _MANY[1]] or [_MANY[0]]
    products = {tokens: subjects.experts(format, several(tokens), tokens) for tokens in (_FEW, BETWEEN_TOKENS, *many)}
    repeats: dict[int, list[float]] = {tokens: [] for tokens in products}
    disk: list[float] = []
    burst_s: list[float] = []
    for product in products.values():
        product.run()
    for _ in range(_TURNS):
        for tokens, product in products.items():
            repeats[tokens] += _repeats(product, share_s if tokens < MANY_TOKENS else share_s / len(many))
        if known is not None:
            # A disk that nobody read from for a moment begins slowly, which in the profile, where reads follow reads,
            # and in a run is what the first of a layer's take more.
            subjects.read(block_nbytes, in_flight, BURST_READS)
            # As many as the profile's points have, which begin and end as slowly.
            seconds_of_reads = subjects.read(block_nbytes, in_flight, GOING_ON_READS)
            speed = GOING_ON_READS * block_nbytes / seconds_of_reads
            disk.append(speed / known.bytes_per_s(block_nbytes, in_flight))
            burst_s += [subjects.read(block_nbytes, in_flight, BURST_READS) for _ in range(_BURSTS)]
    memory, between, *arithmetic = (
        product.calls
        * curve.seconds(product.weights, tokens, 1, product.entries, product.items)
        / statistics.median(repeats[tokens])
        for tokens, product in products.items()
    )
    if known is None:
        return Speeds(memory, statistics.geometric_mean(arithmetic), between=between)
    bursts = BURST_READS * block_nbytes / statistics.mean(burst_s) / known.burst_bytes_per_s(block_nbytes)
    return Speeds(memory, statistics.geometric_mean(arithmetic), statistics.median(disk), bursts, between)


def _repeats(product: Product, seconds: float) -> list[float]:
    found: list[float] = []
    began = perf_counter()
    while not found or perf_counter() - began < seconds:
        before = perf_counter()
        product.run()
        found.append(perf_counter() - before)
    return found
