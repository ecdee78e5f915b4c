"""Hit rates against the default policy, fed with what the model states, and against the best of fixed choices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.kept_hits import KeptHits
from placement.routing import Popularity, pass_probabilities
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.geometry import Geometry
from prefetch.traces.replay import CacheModel

WARM_PASSES, PASSES = 120, 240


def forecast_rate(count: int, top_k: int, layers: int, batch: int, popularity: Popularity, slots: int) -> float:
    """Hit rate of decode after a warm-up: top_k of Gumbel-perturbed weights, a share of the token's before kept."""
    generator = np.random.default_rng(3)
    weights = -popularity.skew * np.log(np.arange(1, count + 1))
    cache = CacheModel(ForecastPolicy(Geometry((count,) * layers)), slots)
    before: dict[tuple[int, int], np.ndarray] = {}
    hits = needed = 0
    for index in range(PASSES):
        for layer in range(layers):
            routed: set[int] = set()
            for sequence in range(batch):
                scores = weights + generator.gumbel(size=count)
                if (layer, sequence) in before:
                    last = before[layer, sequence]
                    scores[last[generator.random(top_k) < popularity.locality]] = np.inf
                chosen = before[layer, sequence] = np.argsort(-scores)[:top_k]
                routed.update((layer * count + chosen).tolist())
            keys = sorted(routed)
            missed = cache.step(keys)
            if index >= WARM_PASSES:
                hits += len(keys) - len(missed)
                needed += len(keys)
    return hits / needed


@pytest.mark.parametrize(
    ("count", "top_k", "layers", "batch", "skew", "locality"),
    [(64, 8, 4, 1, 0.0, 0.0), (64, 8, 4, 1, 0.8, 0.0), (32, 2, 6, 1, 0.4, 0.3), (32, 4, 4, 4, 0.5, 0.2)],
)
def test_the_rate_is_that_of_the_default_policy(
    count: int, top_k: int, layers: int, batch: int, skew: float, locality: float
) -> None:
    popularity = Popularity(skew, locality)
    curve = KeptHits([(count, top_k)] * layers, popularity, batch)
    for share in (0.25, 0.5, 0.8):
        slots = round(share * layers * count)
        found = forecast_rate(count, top_k, layers, batch, popularity, slots)
        assert curve.rate(np.array([float(slots)]))[0] == pytest.approx(found, abs=0.06), share


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_prompts_find_what_the_policy_keeps(skew: float) -> None:
    """LRU would find nothing in a cache that is smaller than what a pass needs."""
    count, top_k, layers, tokens = 32, 4, 6, 24
    curve = KeptHits([(count, top_k)] * layers, Popularity(skew), tokens=tokens)
    for share in (0.25, 0.5, 0.8):
        slots = round(share * layers * count)
        found = forecast_rate(count, top_k, layers, tokens, Popularity(skew), slots)
        assert curve.rate(np.array([float(slots)]))[0] == pytest.approx(found, abs=0.06), share
    assert curve.rate(np.array([float(layers * count)]))[0] == 1.0


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_without_locality_the_most_popular_are_kept(skew: float) -> None:
    layers, popularity = [(16, 2), (40, 4), (16, 2)], Popularity(skew)
    probabilities = np.concatenate([pass_probabilities(count, top_k, 3, popularity) for count, top_k in layers])
    best = np.cumsum(np.sort(probabilities)[::-1]) / probabilities.sum()
    curve = KeptHits(layers, popularity, 3)
    passing = 0.7 * probabilities.sum() / len(layers)
    for slots in (12, 30, 60):
        assert curve.rate(np.array([slots + passing]))[0] == pytest.approx(best[slots - 1], abs=1e-9)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=4),
    st.integers(1, 50),
    st.floats(0, 2),
    st.floats(0, 0.9),
)
def test_more_slots_never_find_less(layers: list[tuple[int, int]], batch: int, skew: float, locality: float) -> None:
    curve = KeptHits(layers, Popularity(skew, locality), batch)
    experts = sum(count for count, _ in layers)
    rates = curve.rate(np.arange(experts + 1) * 1.0)
    assert (np.diff(rates) >= -1e-12).all()
    assert ((rates >= 0) & (rates <= 1)).all()
    assert rates[0] == 0.0 and rates[-1] == 1.0


def test_what_repeats_is_found_first() -> None:
    slots = np.array([128.0])
    rates = [KeptHits([(64, 8)] * 8, Popularity(0, share)).rate(slots)[0] for share in (0.0, 0.5)]
    assert rates[1] > rates[0] + 0.25
