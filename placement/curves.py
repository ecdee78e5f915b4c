"""Seconds of matrix products as a function of tokens, as few numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BETWEEN_TOKENS, MANY_TOKENS = 8, 32
"""Of products that wait for memory and for arithmetic, and of those that wait for arithmetic alone."""

ROOFLINE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class SmallProducts:
    """How much faster than a curve says products are that have few weights, at a moment.

    Straight in the logarithms of weights, from `large` to `weights` and no further, and of tokens, from 1 to
    MANY_TOKENS.

    Attributes:
        weights: of a small product, or of one of the experts of a call.
        large: of those that the curve's points are of.
        few: of one token, times as fast as the curve says; 1 is the same.
        many: likewise of MANY_TOKENS and more.
    """

    weights: float
    large: float
    few: float
    many: float

    def __post_init__(self) -> None:
        if not 0 < self.weights < self.large or min(self.few, self.many) <= 0:
            raise ValueError(f"small products have fewer weights than large ones, and speeds are above 0: {self}")

    def speed(self, weights: float, tokens: float) -> float:
        """Of a product of so many weights, times as fast as the curve says."""
        size = math.log(self.large / max(weights, 1.0)) / math.log(self.large / self.weights)
        at = math.log(max(tokens, 1.0), MANY_TOKENS)
        size, at = (min(max(share, 0.0), 1.0) for share in (size, at))
        return float((self.few ** (1 - at) * self.many**at) ** size)


@dataclass(frozen=True)
class TokenCurve:
    """Seconds that a device takes for a product with W weights and some tokens.

        seconds(W, tokens, calls, entries, items)
            = calls * (call_s + entries * tokens * entry_s + items * item_s) + W * weight_s(tokens)

    weight_s runs straight between the points, is that of the first below it, and in proportion to tokens beyond the
    last. Invariant: points ascend in tokens and do not descend in seconds, so more tokens never cost less.

    Attributes:
        call_s: seconds of a call whatever its size.
        tokens: of the points.
        weight_s: seconds per weight at these numbers of tokens.
        entry_s: seconds for each token and each of a call's inputs and outputs: they are converted, laid out and
            rounded, which counts where a layer has few weights for each of them.
        item_s: seconds of each expert of a call, whatever its size: its weights lie apart from the others', and what
            was asked for ahead ends with it.
        small: how fast small products are at a moment; None: as the curve says.
    """

    call_s: float
    tokens: tuple[int, ...]
    weight_s: tuple[float, ...]
    entry_s: float = 0.0
    item_s: float = 0.0
    small: SmallProducts | None = None

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.weight_s):
            raise ValueError(f"a curve of {len(self.tokens)} numbers of tokens and {len(self.weight_s)} of seconds")
        ascending = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        slower = all(a <= b for a, b in zip(self.weight_s, self.weight_s[1:], strict=False))
        if (
            min(self.call_s, self.entry_s, self.item_s) < 0
            or self.tokens[0] < 1
            or self.weight_s[0] <= 0
            or not ascending
            or not slower
        ):
            raise ValueError(f"a curve must ascend from 1 token and be positive: {self}")

    def seconds(
        self, weights: float, tokens: float, calls: float = 1.0, entries: float = 0.0, items: float = 0.0
    ) -> float:
        """Seconds of `calls` calls that together multiply `weights` weights; `tokens` tokens with `entries` inputs and
        outputs each, of `items` experts in each call.
        """
        products = calls * max(items, 1.0)
        return calls * self.call_s + self._within_s(weights, tokens, calls * entries, calls * items, products)

    def without_call_s(self, weights: float, tokens: float, entries: float, items: float = 1.0) -> float:
        """Seconds of products within a call, with so many inputs and outputs of a token together, of some experts."""
        return self._within_s(weights, tokens, entries, items, items)

    def _within_s(self, weights: float, tokens: float, entries: float, items: float, products: float) -> float:
        """Seconds of so many products, of experts or of linear layers, without their calls."""
        seconds = items * self.item_s + entries * tokens * self.entry_s + weights * self.seconds_per_weight(tokens)
        return seconds if self.small is None else seconds / self.small.speed(weights / products, tokens)

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

    def with_speeds(
        self, memory: float, arithmetic: float, between: float | None = None, small: SmallProducts | None = None
    ) -> TokenCurve:
        """The curve with memory `memory` times as fast, and whatever else there is `arithmetic` times; small products
        as `small` says.

        The fewest tokens are taken to wait for memory alone. Calls do not wait for it. Products of some tokens are
        `between` times as fast, the closer to BETWEEN_TOKENS the more. Where that was not measured, a point of twice
        the fewest tokens' seconds or more waits for arithmetic alone, and those between are in between.
        """
        fewest = self.weight_s[0]
        moved: list[float] = []
        for tokens, seconds in zip(self.tokens, self.weight_s, strict=True):
            if between is None:
                waits = min(1.0, max(0.0, 2 - seconds / fewest))
                found = seconds * (waits / memory + (1 - waits) / arithmetic)
            else:
                found = seconds / _speed_at(tokens, memory, between, arithmetic)
            moved.append(max(found, moved[-1] if moved else 0.0))
        return TokenCurve(
            self.call_s / arithmetic, self.tokens, tuple(moved), self.entry_s / arithmetic, self.item_s / arithmetic,
            small,
        )  # fmt: skip


def _speed_at(tokens: int, few: float, between: float, many: float) -> float:
    """Straight in the logarithm of tokens from 1 over BETWEEN_TOKENS to MANY_TOKENS."""
    if tokens <= BETWEEN_TOKENS:
        return few + (between - few) * math.log(tokens, BETWEEN_TOKENS)
    share = min(1.0, math.log(tokens / BETWEEN_TOKENS, MANY_TOKENS / BETWEEN_TOKENS))
    return between + (many - between) * share


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


_TURNS = 4
"""Of fitting what depends on each other a little: a call, an expert, an entry."""


class Sample(NamedTuple):
    """A call that was measured; `entries` are inputs and outputs of a token, 0 where they are not told apart; `items`
    are experts.
    """

    weights: int
    tokens: int
    seconds: float
    entries: int = 0
    items: int = 0


def fit_curve(samples: Sequence[Sample]) -> TokenCurve:
    """The curve through measurements.

    The seconds of a call come from the smallest and the largest product at the fewest tokens, of experts of one size;
    those of an expert from smaller ones there; those of entries from the smallest and the largest at the most tokens at
    which both were measured; points from the largest product of each number of tokens, which need not be the same.
    Where noise lets more tokens cost less, neighbours are averaged (isotonic regression by pooling adjacent violators).

    Args:
        samples: of single calls.

    Raises:
        ValueError: no samples, or two of the largest product of a number of tokens.
    """
    if not samples:
        raise ValueError("a curve needs measurements")
    largest = {one.tokens: one for one in sorted(samples, key=lambda one: one.weights)}
    points = sorted(largest.values(), key=lambda one: one.tokens)
    small = [one for one in samples if one.weights < largest[one.tokens].weights]
    if len(points) + len(small) != len(samples):
        raise ValueError("a curve needs one measurement of the largest product for each number of tokens")
    entry_s = item_s = 0.0
    for _ in range(_TURNS):
        call_s = _call_s(points, small, entry_s)
        item_s = _item_s(points, small, call_s, entry_s)
        entry_s = _entry_s(points, small, call_s, item_s)
    call_s = _call_s(points, small, entry_s)
    rising = _isotonic([(_beside(one, entry_s, item_s) - call_s) / one.weights for one in points])
    return TokenCurve(call_s, tuple(one.tokens for one in points), tuple(rising), entry_s, item_s)


def _beside(one: Sample, entry_s: float, item_s: float = 0.0) -> float:
    return one.seconds - one.entries * one.tokens * entry_s - one.items * item_s


def _is_narrower(one: Sample, large: Sample) -> bool:
    """Whether a sample is of smaller experts."""
    return one.items > 0 and one.weights * large.items < large.weights * one.items


def _call_s(points: Sequence[Sample], small: Sequence[Sample], entry_s: float) -> float:
    """Of a call with the fewest tokens, at most half of what the shortest large one takes."""
    fewest = points[0]
    smaller = [one for one in small if one.tokens == fewest.tokens and not _is_narrower(one, fewest)]
    if not smaller:
        return 0.0
    least = min(smaller, key=lambda one: one.weights)
    slope = max(0.0, (_beside(fewest, entry_s) - _beside(least, entry_s)) / (fewest.weights - least.weights))
    most = min(_beside(one, entry_s) for one in points) / 2
    return min(max(0.0, _beside(least, entry_s) - slope * least.weights), most)


def _item_s(points: Sequence[Sample], small: Sequence[Sample], call_s: float, entry_s: float) -> float:
    """Of what smaller experts with the fewest tokens take beyond their share of the large ones' weights."""
    large = points[0]
    narrow = [one for one in small if one.tokens == large.tokens and _is_narrower(one, large)]
    if not narrow:
        return 0.0
    least = min(narrow, key=lambda one: one.weights / one.items)
    share = least.weights / large.weights
    beyond = _beside(least, entry_s) - call_s - share * (_beside(large, entry_s) - call_s)
    # Noise must leave at least half of every large call to its weights.
    most = min((_beside(one, entry_s) - call_s) / one.items for one in points if one.items) / 2
    return min(max(0.0, beyond / (least.items - share * large.items)), most)


def _entry_s(points: Sequence[Sample], small: Sequence[Sample], call_s: float, item_s: float) -> float:
    """Of what a small call with many tokens takes beyond its share of the large one's weights."""
    pairs = [(large, one) for large in points for one in small if one.tokens == large.tokens and one.entries > 0]
    pairs = [(large, one) for large, one in pairs if large.tokens > points[0].tokens]
    if not pairs:
        return 0.0
    large, least = max(pairs, key=lambda pair: pair[0].tokens)
    share = least.weights / large.weights
    entries = least.tokens * (least.entries - share * large.entries)
    beyond = _beside(least, 0.0, item_s) - call_s - share * (_beside(large, 0.0, item_s) - call_s)
    # Noise must leave at least half of every large call to its weights.
    most = min((_beside(one, 0.0, item_s) - call_s) / (one.entries * one.tokens) for one in points) / 2
    return min(max(0.0, beyond / entries), most)


def _isotonic(values: Sequence[float]) -> list[float]:
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in blocks for _ in range(count)]
