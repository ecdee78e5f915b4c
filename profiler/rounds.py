"""What rounds of measurements bring, and the curves through it: of the CPU and of an accelerator alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from placement.curves import Sample, TokenCurve, fit_curve
from placement.hardware_profile import AttentionSpeed, BlockSpeed, FormatCurve
from profiler.subjects import Attention, Product
from profiler.timing import Timing, repeated

PACKED = "int4"
"""Stands for all packed formats in whole passes; what differs is in the curves."""
_FEWEST = 2


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        what: in words.
        tokens: of the product.
        make: the product.
    """

    what: str
    tokens: int
    make: Callable[[], Product]


@dataclass(frozen=True)
class AttentionPoint:
    """Attention of one layer.

    Attributes:
        what: in words.
        new_tokens: of a sequence.
        cached_tokens: before them.
        narrow: heads have few products for each score.
    """

    what: str
    new_tokens: int
    cached_tokens: int
    narrow: bool = False


class MakeAttention(Protocol):
    """Makes attention of so many new and cached tokens."""

    def __call__(self, new_tokens: int, cached_tokens: int, *, narrow: bool) -> Attention:
        """See `Kernels.attention`."""
        ...


@dataclass
class Found:
    """What the rounds brought: repeats of each timing, and sizes of products and of attention."""

    repeats: dict[str, list[float]] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)
    """What of these are seconds of a call."""
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Weights of a product, entries of a token, and experts."""
    attended: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Flops of a call of attention, and its scores."""

    def time(self, what: str, run: Callable[[], object], budget_s: float, calls: int = 1) -> None:
        """Repeat a run of some calls: seconds of one of these."""
        self.add_times(what, (each / calls for each in repeated(run, budget_s=budget_s, fewest=_FEWEST)))

    def add_times(self, what: str, seconds: Iterable[float]) -> None:
        """Seconds of some calls."""
        self.timed.add(what)
        self.repeats.setdefault(what, []).extend(seconds)

    def time_products(self, points: Iterable[Point], budget_s: float) -> None:
        """A round of each point, in `budget_s` seconds."""
        for point in points:
            product = point.make()
            self.sizes[point.what] = product.weights, product.entries, product.items
            self.time(point.what, product.run, budget_s, product.calls)

    def time_attention(self, points: Iterable[AttentionPoint], make: MakeAttention, budget_s: float) -> None:
        """Likewise of attention."""
        for point in points:
            attention = make(point.new_tokens, point.cached_tokens, narrow=point.narrow)
            self.attended[point.what] = attention.flops, attention.scores
            self.time(point.what, attention.run, budget_s, attention.calls)

    def note(self, what: str, value: float) -> None:
        """One more value of something that is no call."""
        self.repeats.setdefault(what, []).append(value)

    def seconds(self, what: str) -> float:
        """Of a call; see `Timing`."""
        return Timing.of(self.repeats[what]).seconds

    def median(self, what: str) -> float:
        """Of what was noted."""
        return statistics.median(self.repeats[what])

    def told(self) -> tuple[str, ...]:
        """What a reader must know of timings that did not stand still."""
        timings = {what: Timing.of(self.repeats[what]) for what in sorted(self.timed)}
        unstable = {what: timing.spread for what, timing in timings.items() if not timing.stable}
        if not unstable:
            return ()
        worst = max(unstable, key=unstable.__getitem__)
        return (
            f"{len(unstable)} of {len(timings)} timings did not become stable; the faster half of the repeats lay "
            f"apart most for {worst}: {unstable[worst]:.0%}",
        )

    def curves(self, points: Mapping[str, Sequence[Point]]) -> tuple[FormatCurve, ...]:
        """The fit of small products and the large ones, by format. fp16 is not measured: its bytes and its ways through
        the kernels are bf16's.
        """
        found = tuple(FormatCurve(format, self._curve(of)) for format, of in points.items())
        return (*found, *(FormatCurve("fp16", one.curve) for one in found if one.format == "bf16"))

    def _curve(self, points: Sequence[Point]) -> TokenCurve:
        samples = []
        for point in points:
            weights, entries, items = self.sizes[point.what]
            samples.append(Sample(weights, point.tokens, self.seconds(point.what), entries, items))
        return fit_curve(samples)

    def attention(self, points: Sequence[AttentionPoint], bandwidth: float) -> AttentionSpeed:
        """Of one token and of many, each a call with few and one with many pairs of tokens and, where scores are to be
        told apart from products, one with narrow heads, in this order. What attention reads it reads at the bandwidth.
        """
        one, many = ([point for point in points if (point.new_tokens == 1) is few] for few in (True, False))
        call_s, few_flops_per_s, few_score_s = self._attention_line([point.what for point in one])
        prompt_call_s, flops_per_s, score_s = self._attention_line([point.what for point in many])
        return AttentionSpeed(call_s, bandwidth, few_flops_per_s, flops_per_s, prompt_call_s, few_score_s, score_s)

    def block_speeds(self, points: Mapping[str, Sequence[str]], bandwidth: float) -> tuple[BlockSpeed, ...]:
        """Attention to blocks by format, of calls as of one token above. So many query heads share a key-value head
        that computing takes longer than reading, which goes at the bandwidth. fp16 is not measured: its bytes and its
        ways through the kernels are bf16's.
        """
        found = []
        for format, calls in points.items():
            call_s, flops_per_s, score_s = self._attention_line(calls)
            found.append(BlockSpeed(format, call_s, bandwidth, flops_per_s, score_s))
        return (*found, *(replace(one, format="fp16") for one in found if one.format == "bf16"))

    def _attention_line(self, calls: Sequence[str]) -> tuple[float, float, float]:
        """(seconds of a call, flops per second, seconds of a score beside its products)."""
        small, large, *narrow = ((*self.attended[what], self.seconds(what)) for what in calls)
        return _line(small, large, *narrow)


_LEAST_OF_PRODUCTS = 0.1
"""Share of a wide head's score that is its products', whatever noise says."""


def _line(
    small: tuple[float, float, float], large: tuple[float, float, float],
    narrow: tuple[float, float, float] | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """(seconds of a call, flops per second, seconds of a score) from (flops, scores, seconds) of a small and of a large
    call, and of one with narrow heads.
    """
    flops_per_s = (large[0] - small[0]) / max(large[2] - small[2], 1e-9)
    call_s = max(0.0, small[2] - small[0] / flops_per_s)
    if narrow is None:
        return call_s, flops_per_s, 0.0
    (wide_flops, wide_s), (narrow_flops, narrow_s) = (
        (flops / scores, max(seconds - call_s, 0.0) / scores) for flops, scores, seconds in (large, narrow)
    )
    most = 1 / flops_per_s
    flop_s = min(max((wide_s - narrow_s) / (wide_flops - narrow_flops), _LEAST_OF_PRODUCTS * most), most)
    return call_s, 1 / flop_s, (most - flop_s) * wide_flops
