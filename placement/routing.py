"""How often experts are needed, and how often a cache of some slots has them.

Without a trace, a stated model of popularity: in each layer the expert of rank r (from 1) is chosen in proportion to
r^-skew, independently from token to token, but for a share `locality` of a token's experts that are those of the token
before. From that follow the distinct experts of a pass, and the hit rate of one least-recently-used cache over all
layers, after Che, Tung and Wang ("Hierarchical web caching systems", 2002): an expert is found if it was needed more
recently than the time in which the cache sees as many distinct experts as it has slots. Passes go through the layers in
turn, so times between two uses are whole passes: a cache smaller than what one pass needs finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from placement.stack_distances import stack_distances

FloatArray = npt.NDArray[np.float64]

_EXACT_AGES = 64
_AGE_RATIO = 1.15
_OLDEST_AGE = 1e7
_SOLVE_STEPS = 60
_PLACES = (0.125, 0.375, 0.625, 0.875)
"""Where among its layer's last needs an expert stands, as a share: the middles of quarters."""

_ORDER_VARIANCE = 0.25
"""Of the number of distinct experts between two uses, from the order within a layer."""


@dataclass(frozen=True)
class Popularity:
    """The stated model.

    Attributes:
        skew: 0 for experts that are all alike; measured models lie between 0.3 and 1.
        locality: share of a token's experts that the sequence's token before had too, beyond chance; 0 to below 1.
    """

    skew: float = 0.0
    locality: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.skew <= 10 or not 0 <= self.locality < 1:
            raise ValueError(f"skew={self.skew} must be 0 to 10 and locality={self.locality} at least 0 and below 1")


@dataclass(frozen=True)
class LayerDemand:
    """What a pass needs of one MoE layer, on average.

    Attributes:
        distinct: experts that at least one of the pass's tokens goes to.
        pairs: (token, expert) pairs.
    """

    distinct: float
    pairs: float

    @property
    def tokens_per_expert(self) -> float:
        """Tokens of each needed expert."""
        return self.pairs / self.distinct


class HitCurve(Protocol):
    """The hit rate of a cache, by slots."""

    def rate(self, slots: FloatArray) -> FloatArray:
        """Share of the needed experts that are found, for each number of slots; never falls with more."""
        ...


class NothingToFind:
    """The hit curve of a model without experts: nothing is ever missing."""

    def rate(self, slots: FloatArray) -> FloatArray:
        """See `HitCurve`."""
        return np.ones_like(slots)


def inclusion(count: int, top_k: int, skew: float) -> FloatArray:
    """Probability of each expert, by rank, to be among the `top_k` that a token is routed to; sums to top_k.

    Choosing without replacement in proportion to weights w is approximated by 1 - exp(-c w), with c such that the sum
    is right (Poisson sampling conditioned on its size); exact where all weights are the same.
    """
    if top_k >= count:
        return np.ones(count)
    weights = np.arange(1, count + 1, dtype=np.float64) ** -skew
    low, high = 0.0, 1.0
    while -np.expm1(-high * weights).sum() < top_k:
        high *= 2
    for _ in range(_SOLVE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * weights).sum() < top_k else (low, middle)
    return np.asarray(-np.expm1(-high * weights))


@lru_cache(maxsize=512)
def pass_probabilities(count: int, top_k: int, tokens: int, popularity: Popularity) -> tuple[float, ...]:
    """Probability of each expert, by rank, to be needed by a pass of `tokens` tokens."""
    chosen = np.minimum(inclusion(count, min(top_k, count), popularity.skew), 1.0)
    return tuple((1 - (1 - chosen) ** tokens).tolist())


def demand(count: int, top_k: int, tokens: int, popularity: Popularity) -> LayerDemand:
    """What a pass of `tokens` tokens needs of a layer of `count` experts."""
    each = min(top_k, count)
    distinct = float(each) if tokens == 1 else sum(pass_probabilities(count, top_k, tokens, popularity))
    return LayerDemand(distinct, float(tokens * each))


class PopularityHits:
    """The hit rate that follows from a popularity, after many passes of the same kind."""

    def __init__(self, layers: Sequence[tuple[int, int]], tokens: int, popularity: Popularity, batch: int = 1) -> None:
        """Tabulate ages.

        Args:
            layers: (experts, top_k) of each MoE layer.
            tokens: of a pass, all sequences together.
            popularity: of the experts.
            batch: sequences; the share of experts that repeat is what all of them keep.
        """
        kinds: dict[tuple[int, int], int] = {}
        for layer in layers:
            kinds[layer] = kinds.get(layer, 0) + 1
        self.experts = sum(count * times for (count, _), times in kinds.items())
        # Of locality a sequence keeps its own experts only where a pass is one token of each.
        self.locality = popularity.locality if tokens == batch else 0.0
        ages, widths = _ages()
        distinct = np.zeros(len(ages))
        variance = np.zeros(len(ages))
        found = np.zeros(len(ages))
        needed = 0.0
        own = np.zeros(len(ages))
        for (count, top_k), times in kinds.items():
            q = np.array(pass_probabilities(count, top_k, tokens, popularity))
            unseen = (1 - q)[None, :] ** ages[:, None]
            distinct += times * (1 - unseen).sum(axis=1)
            chosen = np.minimum(inclusion(count, min(top_k, count), popularity.skew), 1.0)
            variance += times * _coverage_variance(chosen, unseen, ages * tokens)
            before = (1 - q)[None, :] ** (ages - widths)[:, None]
            found += times * ((before - unseen) * q).sum(axis=1)
            own += times / len(layers) * ((1 - q)[None, :] ** (ages - 1)[:, None] * q).sum(axis=1)
            needed += times * float(q.sum())
        # A layer's experts are looked up together, so of its own last needs only those after an expert's own count: it
        # stands anywhere among them, which matters while ages are single passes.
        young = _EXACT_AGES
        places = [distinct[:young] - own[:young] * place for place in _PLACES]
        self._distinct = np.concatenate([*places, distinct[young:]])
        spread = np.sqrt(variance + (own * _PLACES[0]) ** 2 / 3 + _ORDER_VARIANCE)
        self._spread = np.concatenate([*[spread[:young]] * len(_PLACES), spread[young:]])
        found /= needed
        self._weights = np.concatenate([*[found[:young] / len(_PLACES)] * len(_PLACES), found[young:]])

    def rate(self, slots: FloatArray) -> FloatArray:
        """See `HitCurve`."""
        slots = np.asarray(slots, dtype=np.float64)
        z = (slots[:, None] - self._distinct[None, :] + 0.5) / self._spread[None, :]
        reached = _normal_cdf(z)
        independent = reached @ self._weights
        repeated = reached[:, : len(_PLACES) * _EXACT_AGES : _EXACT_AGES].mean(axis=1)
        rate = self.locality * repeated + (1 - self.locality) * independent
        # Every expert has a slot: nothing is ever read again, whatever the tail of the ages says.
        return np.where(slots >= self.experts, 1.0, np.minimum(rate, 1.0))


@lru_cache(maxsize=256)
def popularity_hits(
    layers: tuple[tuple[int, int], ...], tokens: int, popularity: Popularity, batch: int
) -> PopularityHits:
    """A `PopularityHits`, made once."""
    return PopularityHits(layers, tokens, popularity, batch)


def residency(
    layers: Sequence[tuple[int, int]], popularity: Popularity, slots: float, tokens: int = 1
) -> list[FloatArray]:
    """Probability of each layer's experts, by rank, to be among the `slots` that were needed last.

    By the age at which as many distinct experts were seen as there are slots.

    Args:
        layers: (experts, top_k) of each MoE layer.
        popularity: of the experts.
        slots: of the cache.
        tokens: of a pass.
    """
    q = [np.array(pass_probabilities(count, top_k, tokens, popularity)) for count, top_k in layers]
    if slots >= sum(map(len, q)):
        return [np.ones(len(one)) for one in q]
    low, high = 0.0, _OLDEST_AGE
    for _ in range(2 * _SOLVE_STEPS):
        middle = (low + high) / 2
        seen = sum(float((1 - (1 - one) ** middle).sum()) for one in q)
        low, high = (middle, high) if seen < slots else (low, middle)
    return [np.asarray(1 - (1 - one) ** low) for one in q]


class MeasuredHits:
    """The hit rate of a least-recently-used cache on a recorded sequence, for every number of slots; see
    `stack_distances`.
    """

    def __init__(
        self,
        keys: npt.ArrayLike,
        steps: npt.ArrayLike | None = None,
        counted: npt.ArrayLike | None = None,
        experts: int | None = None,
    ) -> None:
        """Count distances.

        Args:
            keys: integers [n], expert keys in the order of use, each once for each layer and pass.
            steps: where the layers of passes begin; None for requests by themselves.
            counted: bool [n], whose hits count; None for all.
            experts: of the model, which are all there once so many slots are; None for a cache that starts empty.

        Raises:
            ValueError: nothing counts.
        """
        distances = stack_distances(keys, steps)
        if counted is not None:
            distances = distances[np.asarray(counted, dtype=bool)]
        if not len(distances):
            raise ValueError("a hit rate needs at least one routed expert")
        again = distances[distances >= 0]
        counts = np.bincount(again + 1, minlength=1)
        self._reached = np.cumsum(counts) / len(distances)
        self._experts = experts

    def rate(self, slots: FloatArray) -> FloatArray:
        """See `HitCurve`."""
        slots = np.asarray(slots)
        index = np.clip(slots.astype(np.int64), 0, len(self._reached) - 1)
        reached: FloatArray = self._reached[index]
        return reached if self._experts is None else np.where(slots >= self._experts, 1.0, reached)


def _ages() -> tuple[FloatArray, FloatArray]:
    """Ends of the intervals of ages, in passes, and their widths: single passes first, then wider and wider."""
    ends = [float(age) for age in range(1, _EXACT_AGES + 1)]
    while ends[-1] < _OLDEST_AGE:
        ends.append(float(int(ends[-1] * _AGE_RATIO)))
    array = np.array(ends)
    return array, np.diff(array, prepend=0.0)


def _coverage_variance(chosen: FloatArray, unseen: FloatArray, draws: FloatArray) -> FloatArray:
    """Variance of the number of distinct experts of a layer, by age.

    That of independent experts, less what they share because each token takes the same number (Hajek's covariance of
    fixed-size samples, to first order): for one token there is none.

    Args:
        chosen: [experts] probability that a token takes it.
        unseen: [ages, experts] probability that it was not needed in all that time.
        draws: [ages] tokens in that time.
    """
    independent = (unseen * (1 - unseen)).sum(axis=1)
    each = float((chosen * (1 - chosen)).sum())
    if each == 0:
        return np.zeros(len(draws))
    shared = draws / each * (unseen * chosen).sum(axis=1) ** 2
    return np.asarray(np.maximum(independent - shared, 0.0))


def _normal_cdf(z: FloatArray) -> FloatArray:
    """Of the normal distribution, to 2e-4, by the hyperbolic tangent (Page 1977); rises everywhere."""
    z = np.clip(z, -8.0, 8.0)
    return np.asarray(0.5 * (1 + np.tanh(0.7978845608 * (z + 0.044715 * z**3))))
