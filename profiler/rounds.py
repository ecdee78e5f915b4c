"""What rounds of measurements bring, and the curves through it: of the CPU and of an accelerator alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """Attention of one layer: what it is in words, new tokens, and cached ones before them."""

    what: str
    new_tokens: int
    cached_tokens: int


@dataclass
class Found:
    """What the rounds brought: repeats of each timing, and sizes of products and of attention."""

    repeats: dict[str, list[float]] = field(default_factory=dict)
    timed: set[str] = field(default_factory=set)
    """What of these are seconds of a call."""
    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Weights of a product, entries of a token, and experts."""
    flops: dict[str, float] = field(default_factory=dict)

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

    def time_attention(
        self, points: Iterable[AttentionPoint], make: Callable[[int, int], Attention], budget_s: float
    ) -> None:
        """Likewise of attention; `make` is told numbers of new and of cached tokens."""
        for point in points:
            attention = make(point.new_tokens, point.cached_tokens)
            self.flops[point.what] = attention.flops
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
        """Of one token beside few cached ones, one beside many, some at once and many at once, in this order. What
        attention reads it reads at the bandwidth.
        """
        one, short, prompt, long = ((self.flops[point.what], self.seconds(point.what)) for point in points)
        call_s, few_flops_per_s = _line(one, short)
        prompt_call_s, flops_per_s = _line(prompt, long)
        return AttentionSpeed(call_s, bandwidth, few_flops_per_s, flops_per_s, prompt_call_s)

    def block_speeds(self, points: Mapping[str, tuple[str, str]], bandwidth: float) -> tuple[BlockSpeed, ...]:
        """Attention to blocks by format, of calls with few and with many cached tokens. So many query heads share a
        key-value head that computing takes longer than reading, which goes at the bandwidth. fp16 is not measured: its
        bytes and its ways through the kernels are bf16's.
        """
        found = []
        for format, calls in points.items():
            call_s, flops_per_s = _line(*((self.flops[what], self.seconds(what)) for what in calls))
            found.append(BlockSpeed(format, call_s, bandwidth, flops_per_s))
        return (*found, *(replace(one, format="fp16") for one in found if one.format == "bf16"))


def _line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(seconds of a call, flops per second) from (flops, seconds) of a small and of a large call."""
    flops_per_s = (large[0] - small[0]) / max(large[1] - small[1], 1e-9)
    return max(0.0, small[1] - small[0] / flops_per_s), flops_per_s
