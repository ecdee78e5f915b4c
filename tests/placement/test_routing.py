"""Hit rates against the cache policy that the runtime runs, fed with what the model states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.routing import (
    MeasuredHits,
    Popularity,
    PopularityHits,
    demand,
    inclusion,
    pass_probabilities,
)
from prefetch.policies.lru import LruPolicy


def draw(layers: int, count: int, top_k: int, tokens: int, skew: float, passes: int) -> Iterator[list[int]]:
    """Keys of each layer of each pass: top_k of Gumbel-perturbed weights, which is drawing without replacement."""
    generator = np.random.default_rng(5)
    weights = -skew * np.log(np.arange(1, count + 1))
    for _ in range(passes):
        for layer in range(layers):
            scores = weights + generator.gumbel(size=(tokens, count))
            chosen = np.unique(np.argsort(-scores, axis=1)[:, :top_k])
            yield [int(layer * count + expert) for expert in chosen]


def lru_rate(requests: Sequence[list[int]], slots: int, warm: int) -> float:
    policy, resident = LruPolicy(), set[int]()
    hits = needed = 0
    for index, keys in enumerate(requests):
        policy.on_route(keys)
        if index >= warm:
            hits += sum(key in resident for key in keys)
            needed += len(keys)
        for key in keys:
            if key in resident:
                continue
            if len(resident) >= slots:
                victim = policy.victim(())
                assert victim is not None
                policy.on_evict(victim)
                resident.discard(victim)
            policy.on_insert(key)
            resident.add(key)
    return hits / needed


@pytest.mark.parametrize(
    ("layers", "count", "top_k", "tokens", "skew"),
    [(6, 64, 8, 1, 0.0), (6, 64, 8, 1, 0.8), (4, 8, 2, 1, 0.5), (4, 64, 4, 4, 0.4), (3, 16, 2, 40, 0.0)],
)
def test_the_rate_is_that_of_the_runtimes_policy(layers: int, count: int, top_k: int, tokens: int, skew: float) -> None:
    requests = list(draw(layers, count, top_k, tokens, skew, passes=200))
    curve = PopularityHits([(count, top_k)] * layers, tokens, Popularity(skew))
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        slots = round(share * layers * count)
        found = lru_rate(requests, slots, warm=len(requests) // 3)
        assert curve.rate(np.array([float(slots)]))[0] == pytest.approx(found, abs=0.04), share


def test_what_a_pass_needs_is_what_is_drawn() -> None:
    requests = list(draw(1, 64, 4, 16, 0.7, passes=400))
    assert demand(64, 4, 16, Popularity(0.7)).distinct == pytest.approx(
        np.mean([len(keys) for keys in requests]), rel=0.02
    )


@given(st.integers(1, 300), st.integers(1, 12), st.floats(0, 3))
def test_inclusion_adds_up_to_top_k(count: int, top_k: int, skew: float) -> None:
    found = inclusion(count, top_k, skew)
    assert found.sum() == pytest.approx(min(top_k, count))
    assert (found <= 1).all()
    assert (np.diff(found) <= 1e-12).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=4),
    st.integers(1, 200),
    st.floats(0, 2),
    st.floats(0, 0.9),
)
def test_more_slots_never_find_less(layers: list[tuple[int, int]], tokens: int, skew: float, locality: float) -> None:
    curve = PopularityHits(layers, tokens, Popularity(skew, locality), tokens)
    experts = sum(count for count, _ in layers)
    rates = curve.rate(np.arange(experts + 1) * 1.0)
    assert (np.diff(rates) >= -1e-12).all()
    assert ((rates >= 0) & (rates <= 1)).all()
    assert rates[-1] == 1.0


def test_locality_finds_what_the_token_before_had() -> None:
    slots = np.array([128.0])
    rates = [PopularityHits([(64, 8)] * 8, 1, Popularity(0, share)).rate(slots)[0] for share in (0.0, 0.5)]
    assert rates[1] > rates[0] + 0.3


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=120))
def test_a_measured_curve_is_the_policy_for_every_number_of_slots(keys: list[int]) -> None:
    curve = MeasuredHits(keys)
    requests = [[key] for key in keys]
    for slots in range(1, 14):
        assert curve.rate(np.array([float(slots)]))[0] == pytest.approx(lru_rate(requests, slots, warm=0))


def test_no_sequence_has_no_rate() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MeasuredHits([])


@pytest.mark.parametrize(("skew", "locality"), [(-1.0, 0.0), (0.0, 1.0), (0.0, -0.1), (11.0, 0.0)])
def test_a_popularity_has_bounds(skew: float, locality: float) -> None:
    with pytest.raises(ValueError):
        Popularity(skew, locality)


def test_a_pass_of_all_experts_needs_all() -> None:
    assert sum(pass_probabilities(4, 4, 1, Popularity())) == 4
    assert demand(4, 9, 3, Popularity()).tokens_per_expert == 3
