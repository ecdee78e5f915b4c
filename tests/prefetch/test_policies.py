"""Every policy: what the tier relies on, and its ranking against a definition written out."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.policies.arc import ArcPolicy
from prefetch.policies.base import CachePolicy
from prefetch.policies.belady import BeladyPolicy
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.frequency_recency import FrequencyRecencyPolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.lfu import LfuPolicy
from prefetch.policies.mrs import MrsPolicy
from prefetch.policies.named import _MAKERS, UnknownPolicyError, make_policy
from prefetch.policies.names import POLICIES
from prefetch.policies.quotas import QuotaPolicy, shallow_first
from prefetch.policies.valued import ValuedPolicy
from prefetch.policies.windows import WindowPolicy

GEOMETRY = Geometry((5, 3, 6))


class Tier:
    """The calls that a tier makes, and nothing else."""

    def __init__(self, policy: CachePolicy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.resident: set[int] = set()
        self.misses = 0
        policy.on_resize(slots)

    def step(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        self.policy.on_route(keys, shares)
        for key in keys:
            if key not in self.resident:
                self.misses += 1
                self.insert(key)

    def insert(self, key: int) -> None:
        if len(self.resident) == self.slots:
            victim = self.policy.victim({key})
            assert victim in self.resident
            self.policy.on_evict(victim)
            self.resident.remove(victim)
        self.policy.on_insert(key)
        self.resident.add(key)


def layer_keys(layer: int) -> list[int]:
    return list(range(int(GEOMETRY.first_keys[layer]), int(GEOMETRY.first_keys[layer + 1])))


def random_routes(chance: random.Random, steps: int) -> list[list[int]]:
    return [
        sorted(chance.sample(keys, chance.randint(1, len(keys))))
        for keys in (layer_keys(step % GEOMETRY.layers) for step in range(steps))
    ]


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), slots=st.integers(1, GEOMETRY.total))
def test_what_a_tier_relies_on(name: str, seed: int, slots: int) -> None:
    chance = random.Random(seed)
    policy = make_policy(name, GEOMETRY)
    tier = Tier(policy, slots)
    for step, keys in enumerate(random_routes(chance, 30)):
        tier.step(keys, [chance.random() for _ in keys] if chance.random() < 0.2 else None)
        first = int(GEOMETRY.first_keys[step % GEOMETRY.layers])
        scores = np.array([chance.random() for _ in layer_keys(step % GEOMETRY.layers)], np.float32)
        if chance.random() < 0.5:
            policy.on_scores(first, scores)
        if chance.random() < 0.3:
            policy.on_forecast(first, scores)
        pinned = set(chance.sample(range(GEOMETRY.total), chance.randint(0, GEOMETRY.total)))
        one_by_one, held = [], set(pinned)
        while (victim := policy.victim(held)) is not None:
            held.add(victim)
            one_by_one.append(victim)
        assert len(one_by_one) == len(set(one_by_one))
        assert set(one_by_one) == tier.resident - pinned, "a slot would never be free again, or a stranger is evicted"
        for count in (0, 1, 3, GEOMETRY.total + 2):
            found = policy.victims(pinned, count)
            assert len(found) == len(set(found)) == min(count, len(one_by_one))
            if isinstance(policy, ValuedPolicy):
                assert found == one_by_one[:count]
        if chance.random() < 0.1 and tier.resident:
            lost = chance.choice(sorted(tier.resident))
            policy.on_evict(lost)
            tier.resident.remove(lost)
        if chance.random() < 0.1:
            tier.slots = max(len(tier.resident), chance.randint(1, GEOMETRY.total))
            policy.on_resize(tier.slots)


def ranking(policy: CachePolicy) -> list[int]:
    """Resident keys, the first to evict first."""
    return policy.victims((), GEOMETRY.total)


def filled(policy: CachePolicy, keys: Sequence[int]) -> CachePolicy:
    policy.on_resize(GEOMETRY.total)
    for key in keys:
        policy.on_insert(key)
    return policy


def test_lfu_decays_by_decoded_token_and_weighs_cost() -> None:
    policy = LfuPolicy(GEOMETRY, decay=0.5)
    filled(policy, layer_keys(0))
    for keys in ([0, 1], [0], [2], [2]):
        policy.on_route(keys)
    # By hand: 0: 1/8 + 1/4, 1: 1/8, 2: 1/2 + 1, 3 and 4: 0.
    assert policy.values[:5].tolist() == [0.375, 0.125, 1.5, 0.0, 0.0]
    assert ranking(policy) == [3, 4, 1, 0, 2]
    costs = [1.0] * GEOMETRY.total
    costs[1] = 100.0
    dear = LfuPolicy(Geometry(GEOMETRY.counts, tuple(costs)), decay=0.5)
    filled(dear, layer_keys(0))
    for keys in ([0, 1], [0], [2], [2]):
        dear.on_route(keys)
    assert ranking(dear) == [3, 4, 0, 2, 1]


def test_mrs_blends_the_highest_scores() -> None:
    policy = MrsPolicy(GEOMETRY, alpha=0.5)
    filled(policy, layer_keys(0))
    policy.on_route([4])
    policy.on_scores(0, np.array([0.1, 0.3, 0.05, 0.15, 0.4]))
    # p = 2 x 1: only the two highest count; the first use was noted before any scores came.
    assert policy.scores[:5] == pytest.approx([0.0, 0.15, 0.0, 0.0, 0.45])
    policy.on_route([1])
    policy.on_scores(0, np.array([0.5, 0.2, 0.1, 0.1, 0.1]))
    assert policy.scores[:5] == pytest.approx([0.25, 0.175, 0.0, 0.0, 0.225])
    assert ranking(policy)[:2] == [2, 3]


def test_windows_count_the_window_that_runs_and_the_one_before() -> None:
    policy = WindowPolicy(GEOMETRY, window=2)
    filled(policy, layer_keys(0))
    for keys in ([0, 1], [0], [1], [1], [3]):
        policy.on_route(keys)
    assert policy.values[:5].tolist() == [0.0, 2.0, 0.0, 1.0, 0.0]


def test_frequency_and_recency_multiply() -> None:
    policy = FrequencyRecencyPolicy(GEOMETRY, decay=1.0)
    filled(policy, layer_keys(0))
    for keys in ([0], [0], [1]):
        policy.on_route(keys)
    assert policy.values[:3].tolist() == [2 / 2, 1.0, 0.0]


def test_a_prefill_counts_by_share() -> None:
    policy = LfuPolicy(GEOMETRY, decay=0.9)
    filled(policy, layer_keys(0))
    for _ in range(5):
        policy.on_route([0, 1])
    policy.on_route(layer_keys(0), [0.1, 0.1, 0.2, 0.2, 0.4])
    assert set(ranking(policy)[-2:]) == {0, 1}, "a prefill flushed what decode needs"


class ArcByTheBook:
    """The pseudo-code of the FAST 2003 paper, figure 4, with plain lists; the oldest is first."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def replace(self, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: int) -> bool:
        """Whether it was a hit."""
        for cached in (self.t1, self.t2):
            if x in cached:
                cached.remove(x)
                self.t2.append(x)
                return True
        if x in self.b1:
            self.p = min(self.c, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.replace(False)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.replace(True)
            self.b2.remove(x)
            self.t2.append(x)
        else:
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    self.replace(False)
                else:
                    self.t1.pop(0)
            elif len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) >= self.c:
                if len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) == 2 * self.c:
                    self.b2.pop(0)
                self.replace(False)
            self.t1.append(x)
        return False


def zipf_requests(seed: int, count: int) -> list[int]:
    chance = np.random.default_rng(seed)
    return (chance.zipf(1.3, count) % GEOMETRY.total).tolist()


def test_arc_misses_about_as_the_paper_does() -> None:
    """Not to the request: a tie at the target goes the other way for keys that B2 remembers."""
    for slots in (2, 4, 7):
        book, tier = ArcByTheBook(slots), Tier(ArcPolicy(), slots)
        requests = zipf_requests(slots, 3000)
        expected = sum(not book.request(key) for key in requests)
        for key in requests:
            tier.step([key])
        assert tier.misses == pytest.approx(expected, rel=0.03)


def exhaustive_misses(requests: Sequence[int], slots: int) -> int:
    """The fewest misses of one-key requests, over all choices of victims."""
    states = {frozenset[int](): 0}
    for key in requests:
        following: dict[frozenset[int], int] = {}
        for state, misses in states.items():
            if key in state:
                options = [(state, misses)]
            elif len(state) < slots:
                options = [(state | {key}, misses + 1)]
            else:
                options = [((state - {victim}) | {key}, misses + 1) for victim in state]
            for option, cost in options:
                following[option] = min(cost, following.get(option, cost))
        states = following
    return min(states.values())


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_belady_is_the_least_there_is(slots: int) -> None:
    for seed in range(10):
        requests = zipf_requests(seed, 40)
        tier = Tier(BeladyPolicy([[key] for key in requests]), slots)
        for key in requests:
            tier.step([key])
        assert tier.misses == exhaustive_misses(requests, slots)


def test_belady_sees_only_what_was_foretold() -> None:
    policy = BeladyPolicy([[1], [2]])
    policy.on_route([1])
    with pytest.raises(ValueError, match="not foretold"):
        policy.on_route([1])


def test_quotas_take_from_the_layer_that_is_furthest_above() -> None:
    policy = QuotaPolicy(LfuPolicy(GEOMETRY), GEOMETRY)
    policy.on_resize(6)
    assert policy.quotas == (2, 2, 2)
    for key in (0, 1, 2, 3, 8, 9, 10):
        policy.on_insert(key)
    policy.on_route([0, 1, 2])
    assert policy.victim(()) == 3
    assert policy.victim({0, 1, 2, 3}) == 8, "all of the fullest layer are pinned"
    assert shallow_first(GEOMETRY, 9, 1) == (5, 2, 2)
    assert shallow_first(GEOMETRY, 3, 1) == (3, 0, 0)


def test_names_that_nobody_has_are_refused() -> None:
    assert tuple(_MAKERS) == POLICIES
    with pytest.raises(UnknownPolicyError, match="'fifo': expected auto or one of forecast, lru"):
        make_policy("fifo", GEOMETRY)
    for bad in (lambda: LfuPolicy(GEOMETRY, 1.5), lambda: MrsPolicy(GEOMETRY, 0.0), lambda: WindowPolicy(GEOMETRY, 0)):
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(ValueError, match="reload_s of 1"):
        Geometry((2,), (1.0,))


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def forecast_inputs(shares: Sequence[float], last: float, since: float) -> list[float]:
    kept = [min(max(share, 0.01), 0.99) for share in shares]
    return [*(float(np.log(share / (1 - share))) for share in kept), last, float(np.log(1 + since)), 1.0]


def test_forecast_is_a_logistic_regression_that_learns() -> None:
    policy = ForecastPolicy(Geometry((2,)))
    policy.on_route([0], [0.5])
    # A prefill shows popularity; nothing is learnt from it.
    weights = ForecastPolicy(Geometry((1,))).weights[0]
    seen = [forecast_inputs((0.005, 0.05, 0.2), 0.0, 20.0), forecast_inputs((0, 0, 0), 0.0, 20.0)]
    before = [sigmoid(float(weights @ np.array(x))) for x in seen]
    assert policy.expected(0).tolist() == pytest.approx(before)
    assert policy.weights[0] == pytest.approx(weights)
    policy.on_route([0])
    errors = [1.0 - before[0], 0.0 - before[1]]
    weights = weights + 0.05 / 2 * sum(error * np.array(x) for error, x in zip(errors, seen, strict=True))
    assert policy.weights[0] == pytest.approx(weights)
    shares = (0.005 * 0.99 + 0.01, 0.05 * 0.9 + 0.1, 0.2 * 0.6 + 0.4)
    after = [forecast_inputs(shares, 1.0, 0.0), forecast_inputs((0, 0, 0), 0.0, 21.0)]
    predicted = [sigmoid(float(weights @ np.array(x))) for x in after]
    assert policy.expected(0).tolist() == pytest.approx(predicted)
    # The next token learns what follows expert 0.
    assert not policy.links[0].any()
    policy.on_route([1])
    assert policy.links[0][0].tolist() == pytest.approx([0.07 * (0 - predicted[0]), 0.07 * (1 - predicted[1])])
    assert not policy.links[0][1].any()


def test_what_forecast_expects_of_a_layer_is_its_own() -> None:
    geometry = Geometry((3, 200, 64))
    policy, firsts = ForecastPolicy(geometry), [0, 3, 203]
    for _ in range(40):
        policy.on_route([1])
        policy.on_route([3, 3 + 63, 3 + 64, 3 + 199])
        policy.on_route([203, 203 + 63])
    needed = [[1], [0, 63, 64, 199], [0, 63]]
    for layer, (first, used) in enumerate(zip(firsts, needed, strict=True)):
        expected = policy.expected(first).copy()
        assert expected.shape == (geometry.counts[layer],)
        assert sorted(np.argsort(-expected)[: len(used)].tolist()) == used
        # What a predictor says counts for victims only.
        policy.on_forecast(first, np.linspace(0.0, 1.0, geometry.counts[layer]))
        assert np.array_equal(policy.expected(first), expected)
    shallow = make_policy("lfu-shallow-first", geometry)
    assert shallow.expected(0) is None
    assert make_policy("lru", geometry).expected(3) is None


def test_forecast_learns_what_follows_what() -> None:
    """Tokens of two kinds in no order that shares could show: what a token used says what the next one will."""
    geometry = Geometry((8, 8))
    follows = [2, 0, 3, 1]
    policy, chance, kind, right = ForecastPolicy(geometry), random.Random(1), 0, []
    for token in range(400):
        kind = follows[kind] if chance.random() < 0.95 else chance.randrange(4)
        for layer in range(2):
            first = 8 * layer
            if token > 300:
                best = int(np.argmax(policy.expected(first)))
                right.append(best // 2 == kind)
            policy.on_route([first + 2 * kind, first + 2 * kind + 1])
    assert sum(right) / len(right) > 0.85


def test_what_forecast_learnt_is_kept() -> None:
    taught, fresh = ForecastPolicy(GEOMETRY), ForecastPolicy(GEOMETRY)
    chance = random.Random(5)
    for keys in random_routes(chance, 90):
        taught.on_route(keys)
    fresh.restore(taught.state())
    assert np.array_equal(fresh.weights, taught.weights)
    assert all(np.array_equal(one, other) for one, other in zip(fresh.links, taught.links, strict=True))
    taught.on_route([0])
    assert not np.array_equal(fresh.weights, taught.weights), "the two share tables"
    with pytest.raises(ValueError, match="another model"):
        ForecastPolicy(Geometry((5, 3, 7))).restore(fresh.state())
    damaged = fresh.state()
    damaged["links 1"][0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        fresh.restore(damaged)


def even_chances(policy: ForecastPolicy) -> None:
    policy.values[:], policy.fixed[:] = 0.5, 0.0
    for layer in range(GEOMETRY.layers):
        policy.refresh_layer(layer)


def test_forecast_keeps_what_comes_sooner_and_believes_a_predictor() -> None:
    policy = ForecastPolicy(GEOMETRY)
    filled(policy, [0, 5, 8])
    even_chances(policy)
    policy.on_route([8])
    even_chances(policy)
    # Layer 2 was visited: layer 0 comes next, layer 2 last.
    assert ranking(policy) == [8, 5, 0]
    policy.on_forecast(0, np.array([0.05, 0.5, 0.5, 0.5, 0.5]))
    assert ranking(policy) == [0, 8, 5]
    policy.on_route([0])
    even_chances(policy)
    assert ranking(policy) == [0, 8, 5], "layer 0 was passed: it comes last, and the forecast is spent"


def test_what_this_pass_does_not_need_may_be_needed_by_the_next() -> None:
    geometry = Geometry((2, 2))
    policy = ForecastPolicy(geometry)
    filled(policy, [0, 1])
    for _ in range(60):
        policy.on_route([0])
        policy.on_route([2])
    # Neither is needed in this pass, but expert 0 nearly always was.
    policy.on_forecast(0, np.array([0.001, 0.001]))
    worths = [policy.worth(key) for key in (0, 1)]
    assert ranking(policy) == [1, 0]
    # Share q of visits: the mean of 1 / (time + 0.3), time 1.5, 2.5, ... passes.
    shares = (1 - 0.99**60, 0.0)
    for worth, share in zip(worths, shares, strict=True):
        later = sum(share * (1 - share) ** visit / (1.8 + visit) for visit in range(300))
        assert worth == pytest.approx(0.001 / (0.5 + 0.3) + 0.999 * later, abs=0.002)
