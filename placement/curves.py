"""Seconds of matrix products as a function of tokens, as few numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ROOFLINE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class TokenCurve:
    """Seconds that a device takes for a product with W weights and some tokens.

        seconds(W, tokens, calls) = calls * call_s + W * weight_s(tokens)

    weight_s runs straight between the points, is that of the first below it, and in proportion to tokens beyond the
    last. Invariant: points ascend in tokens and do not descend in seconds, so more tokens never cost less.

    Attributes:
        call_s: seconds of a call whatever its size.
        tokens: of the points.
        weight_s: seconds per weight at these numbers of tokens.
    """

    call_s: float
    tokens: tuple[int, ...]
    weight_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.weight_s):
            raise ValueError(f"a curve of {len(self.tokens)} numbers of tokens and {len(self.weight_s)} of seconds")
        ascending = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        slower = all(a <= b for a, b in zip(self.weight_s, self.weight_s[1:], strict=False))
        if self.call_s < 0 or self.tokens[0] < 1 or self.weight_s[0] <= 0 or not ascending or not slower:
            raise ValueError(f"a curve must ascend from 1 token and be positive: {self}")

    def seconds(self, weights: float, tokens: float, calls: float = 1.0) -> float:
        """Seconds of `calls` calls that together multiply `weights` weights, each with `tokens` tokens."""
        return calls * self.call_s + weights * self.seconds_per_weight(tokens)

    def seconds_per_weight(self, tokens: float) -> float:
        """Seconds for one weight, without the call."""
        index = bisect_right(self.tokens, tokens)
        if index == 0:
            return self.weight_s[0]
        if index == len(self.tokens):
            return self.weight_s[-1] * tokens / self.tokens[-1]
        left, slope = self._segments[index - 1]
        return left + slope * (tokens - self.tokens[index - 1])

    @cached_property
    def _segments(self) -> tuple[tuple[float, float], ...]:
        return tuple(
            (self.weight_s[i], (self.weight_s[i + 1] - self.weight_s[i]) / (self.tokens[i + 1] - self.tokens[i]))
            for i in range(len(self.tokens) - 1)
        )

    def with_speeds(self, memory: float, arithmetic: float) -> TokenCurve:
        """The curve with memory `memory` times as fast, and whatever else there is `arithmetic` times.

        The fewest tokens are taken to wait for memory alone. A point of twice their seconds or more waits for products;
        those between are in between. Calls do not wait for memory.
        """
        fewest = self.weight_s[0]
        moved: list[float] = []
        for seconds in self.weight_s:
            waits = min(1.0, max(0.0, 2 - seconds / fewest))
            found = seconds * (waits / memory + (1 - waits) / arithmetic)
            moved.append(max(found, moved[-1] if moved else 0.0))
        return TokenCurve(self.call_s / arithmetic, self.tokens, tuple(moved))


def roofline(bits: float, bytes_per_s: float, flops_per_s: float, call_s: float) -> TokenCurve:
    """The curve of a device by its datasheet: whichever of reading weights and multiplying takes longer.

    Args:
        bits: of a weight, scales included.
        bytes_per_s: at which weights are read.
        flops_per_s: two for each weight and token.
        call_s: of a call.
    """
    read_s = bits / 8 / bytes_per_s
    return TokenCurve(call_s, ROOFLINE_TOKENS, tuple(max(read_s, 2 * t / flops_per_s) for t in ROOFLINE_TOKENS))


def fit_curve(samples: Sequence[tuple[int, int, float]]) -> TokenCurve:
    """The curve through measurements.

    The seconds of a call come from the smallest and the largest product at the fewest tokens; points from the largest
    product at every number of tokens. Where noise lets more tokens cost less, neighbours are averaged (isotonic
    regression by pooling adjacent violators).

    Args:
        samples: (weights, tokens, seconds) of single calls.

    Raises:
        ValueError: no samples, or not of one largest product.
    """
    if not samples:
        raise ValueError("a curve needs measurements")
    largest = max(weights for weights, _, _ in samples)
    points = sorted((tokens, seconds) for weights, tokens, seconds in samples if weights == largest)
    if len({tokens for tokens, _ in points}) != len(points):
        raise ValueError("a curve needs one measurement of the largest product for each number of tokens")
    fewest = points[0][0]
    call_s = 0.0
    smallest = min((s for s in samples if s[1] == fewest), key=lambda sample: sample[0])
    if smallest[0] < largest:
        slope = max(0.0, (points[0][1] - smallest[2]) / (largest - smallest[0]))
        call_s = min(max(0.0, smallest[2] - slope * smallest[0]), min(seconds for _, seconds in points) / 2)
    rising = _isotonic([(seconds - call_s) / largest for _, seconds in points])
    return TokenCurve(call_s, tuple(tokens for tokens, _ in points), tuple(rising))


def _isotonic(values: Sequence[float]) -> list[float]:
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in blocks for _ in range(count)]
