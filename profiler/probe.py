"""How fast the machine is right now, over what its profile says: about a second, before a run or a measurement.

Shared machines change by a third within seconds: other tenants take memory's bandwidth, the sibling threads of the
cores, or the disk, and a virtual machine's processors may come to lie where memory is faster and each other farther
away. That is not the same factor for all work: small work, such as that of Python, loses half of its speed where large
products lose a tenth. So the probe repeats some of the profile's own measurements of each kind: experts and linear
layers of one token, which stream weights from memory, of some tokens, which wait for memory and compute, and of many,
which compute; both with few weights, which wait for each other's cores instead; attention of prompts; whole passes of a
small model, which are calls; reads that go on, and bursts of them. Of many tokens several points of the profile's curve
are repeated: each has an error of its own, which would be taken for the machine's speed. Of bursts the mean counts:
reads that come late now and then hold up a layer, but not reads that go on beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from placement.curves import BETWEEN_TOKENS, MANY_TOKENS, SmallProducts, TokenCurve
from placement.disk import BURST_READS, GOING_ON_READS, Disk
from placement.hardware_profile import SMALL_PROMPT_TOKENS, HardwareProfile, Speeds
from profiler.points import NARROW_COUNT, narrow_tokens
from profiler.profile import LARGE_ROWS, PROMPT_ATTENTION, SMALL_ROWS, several
from profiler.subjects import Product, Subjects

PROBE_S = 1.0
_FEW, _MANY = 1, (MANY_TOKENS, 128)
"""Tokens of a product: those of the curve's points from so many to so many."""
_LINEAR_MANY = (64, 64)
_MOST_APART = 5.0
"""Times that small products may be slower or faster than the curve says: noise is not believed beyond."""
_TURNS = 3
_BURSTS = 4
"""Of a turn."""


@dataclass
class _Repeated:
    """Something that is repeated in every turn.

    Attributes:
        run: a call.
        known_s: what the profile says that it takes.
        shares: of a turn's time.
        found: seconds of calls.
    """

    run: Callable[[], object]
    known_s: float
    shares: float = 1.0
    found: list[float] = field(default_factory=list)

    def repeat(self, seconds: float) -> None:
        """Calls for so long; one at least."""
        began = perf_counter()
        calls = 0
        while not calls or perf_counter() - began < seconds:
            before = perf_counter()
            self.run()
            self.found.append(perf_counter() - before)
            calls += 1

    @property
    def speed(self) -> float:
        """Over what the profile says."""
        return self.known_s / statistics.median(self.found)


@dataclass
class _Reads:
    """The disk, in every turn."""

    subjects: Subjects
    known: Disk
    block_nbytes: int
    in_flight: int
    speeds: list[float] = field(default_factory=list)
    burst_s: list[float] = field(default_factory=list)

    def repeat(self) -> None:
        """A turn."""
        block, in_flight = self.block_nbytes, self.in_flight
        # A disk that nobody read from for a moment begins slowly, which in the profile, where reads follow reads, and
        # in a run is what the first of a layer's take more.
        self.subjects.read(block, in_flight, BURST_READS)
        # As many as the profile's points have, which begin and end as slowly.
        speed = GOING_ON_READS * block / self.subjects.read(block, in_flight, GOING_ON_READS)
        self.speeds.append(speed / self.known.bytes_per_s(block, in_flight))
        self.burst_s += [self.subjects.read(block, in_flight, BURST_READS) for _ in range(_BURSTS)]

    @property
    def bursts(self) -> float:
        """Speed of bursts over what the profile says."""
        speed = BURST_READS * self.block_nbytes / statistics.mean(self.burst_s)
        return speed / self.known.burst_bytes_per_s(self.block_nbytes)


class _Small:
    """Small products of one token and of many, whose speeds beside those of large ones are told."""

    def __init__(self, curve: TokenCurve, large: Product, made: Sequence[tuple[int, Product]]) -> None:
        self._curve, self._made = curve, made
        self._large = large.weights / max(large.items, 1)
        self.repeated = [_Repeated(product.run, 0.0, 0.25) for _, product in made]

    def speeds(self, memory: float, arithmetic: float, between: float | None) -> SmallProducts:
        """What the curve at these speeds says that they take, over what they take; calls are as it says."""
        now = self._curve.with_speeds(memory, arithmetic, between)
        found = []
        for (tokens, product), repeated in zip(self._made, self.repeated, strict=True):
            told_s = now.seconds(product.weights, tokens, 1, product.entries, product.items) - now.call_s
            took_s = statistics.median(repeated.found) / product.calls - now.call_s
            found.append(told_s / min(max(took_s, told_s / _MOST_APART), told_s * _MOST_APART))
        (_, product), *_ = self._made
        return SmallProducts(product.weights / max(product.items, 1), self._large, *found)


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
        format: of the experts that are computed, and of the linear layers.
        block_nbytes: of reads; 0 for none.
        in_flight: reads at once.
        seconds: that it may take, about.
    """
    expert_curve, linear_curve = profile.cpu.expert(format), profile.cpu.linear(format)
    large_experts = {n: subjects.experts(format, several(n), n) for n in _tokens(expert_curve, *_MANY)}
    large_linears = {n: subjects.linear(format, LARGE_ROWS, n) for n in _tokens(linear_curve, *_LINEAR_MANY)}
    experts, linears = _products(expert_curve, large_experts), _products(linear_curve, large_linears, shares=0.5)
    many = narrow_tokens(format, expert_curve.tokens)
    small_experts = _Small(
        expert_curve,
        large_experts[_FEW],
        [(tokens, subjects.experts(format, NARROW_COUNT, tokens, narrow=True)) for tokens in (_FEW, many)],
    )
    small_linears = _Small(
        linear_curve,
        large_linears[_FEW],
        [(tokens, subjects.linear(format, SMALL_ROWS, tokens)) for tokens in (_FEW, _LINEAR_MANY[0])],
    )
    attention = [_attention(subjects, profile, new_tokens) for new_tokens in PROMPT_ATTENTION]
    small = _small_passes(subjects, profile)
    repeated = [*experts, *linears, *small_experts.repeated, *small_linears.repeated, *attention, *small]
    reads = None
    if block_nbytes > 0 and profile.disk is not None:
        reads = _Reads(subjects, profile.disk, block_nbytes, in_flight)
    share_s = seconds / _TURNS / (sum(one.shares for one in repeated) + (reads is not None))
    for one in repeated:
        one.run()
    for _ in range(_TURNS):
        for one in repeated:
            one.repeat(one.shares * share_s)
        if reads is not None:
            reads.repeat()
    few, between, *of_many = (one.speed for one in experts)
    linear_few, linear_between, *linear_many = (one.speed for one in linears)
    step, prompt = (one.speed for one in small) if small else (None, None)
    arithmetic = statistics.geometric_mean(of_many)
    linear_arithmetic = statistics.geometric_mean(linear_many)
    return Speeds(
        memory=few,
        arithmetic=arithmetic,
        disk=1.0 if reads is None else statistics.median(reads.speeds),
        bursts=None if reads is None else reads.bursts,
        between=between,
        linear_memory=linear_few,
        linear_between=linear_between,
        linear_arithmetic=linear_arithmetic,
        small_experts=small_experts.speeds(few, arithmetic, between),
        small_linears=small_linears.speeds(linear_few, linear_arithmetic, linear_between),
        attention=statistics.geometric_mean(one.speed for one in attention),
        steps=step,
        prompts=prompt,
    )


def _tokens(curve: TokenCurve, fewest: int, most: int) -> list[int]:
    """Few tokens, some between, and those of the curve's points of many, or the fewest of these."""
    return [_FEW, BETWEEN_TOKENS, *([n for n in curve.tokens if fewest <= n <= most] or [fewest])]


def _products(curve: TokenCurve, made: Mapping[int, Product], shares: float = 1.0) -> list[_Repeated]:
    """Of few tokens, of some between, and of many, which share what one of the others has."""
    of_many = len(made) - 2
    return [
        _Repeated(
            product.run,
            product.calls * curve.seconds(product.weights, tokens, 1, product.entries, product.items),
            shares if tokens in (_FEW, BETWEEN_TOKENS) else shares / of_many,
        )
        for tokens, product in made.items()
    ]


def _attention(subjects: Subjects, profile: HardwareProfile, new_tokens: int) -> _Repeated:
    one = subjects.attention(new_tokens, 0)
    known_s = profile.cpu.attention.seconds(one.kv_nbytes, one.flops, new_tokens, one.scores)
    return _Repeated(one.run, one.calls * known_s, 1 / (2 * len(PROMPT_ATTENTION)))


def _small_passes(subjects: Subjects, profile: HardwareProfile) -> list[_Repeated]:
    """Of one token, and of a prompt; none where the profile has none."""
    step_s, prompt_s = profile.cpu.small_step_s, profile.cpu.small_prompt_s
    if step_s is None or prompt_s is None:
        return []
    return [
        _Repeated(subjects.small_pass(tokens), known_s, 0.5)
        for tokens, known_s in ((1, step_s), (SMALL_PROMPT_TOKENS, prompt_s))
    ]
