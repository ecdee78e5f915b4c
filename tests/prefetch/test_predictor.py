"""Predictors learn what can be learnt, count what was right, and keep it."""

from __future__ import annotations

import numpy as np
import pytest

from prefetch.policies.geometry import Geometry
from prefetch.predictors import combine_kernel as kernel
from prefetch.predictors.named import name_of
from prefetch.predictors.names import SOURCES
from prefetch.predictors.predictor import Predictor

GEOMETRY = Geometry((12, 12, 9))
TOP_K = 3


def top(values: np.ndarray, k: int = TOP_K) -> np.ndarray:
    return np.sort(np.argsort(-values)[:k]).astype(np.int64)


def decode(predictor: Predictor, tokens: int, *, router_noise: float, shift: float = 0.0, seed: int = 0) -> float:
    """Tokens whose layers' true logits are random; routers see them with noise and a shift. Recall of layer 1."""
    chance = np.random.default_rng(seed)
    bias = shift * np.random.default_rng(99).standard_normal(12)
    right = 0
    for _ in range(tokens):
        logits = [chance.standard_normal(count) for count in GEOMETRY.counts]
        for layer in range(GEOMETRY.layers):
            active = top(logits[layer])
            for ahead in range(1, predictor.depth + 1):
                target = layer + ahead
                if target < GEOMETRY.layers:
                    seen = logits[target] + router_noise * chance.standard_normal(GEOMETRY.counts[target])
                    if target == 1:
                        seen = seen + bias
                    foreseen = predictor.predict(layer, ahead, seen, active, TOP_K)
                    assert foreseen.shape == (GEOMETRY.counts[target],)
                    assert ((foreseen > 0) & (foreseen < 1)).all()
                    if target == 1:
                        right += len(set(top(foreseen)) & set(top(logits[1])))
            predictor.observe(layer, active, logits[layer])
    return right / tokens / TOP_K


def test_all_next_layers_at_once_are_as_one_by_one() -> None:
    together, one_by_one = (Predictor(GEOMETRY, depth=2) for _ in range(2))
    chance = np.random.default_rng(4)
    for _ in range(30):
        for layer, count in enumerate(GEOMETRY.counts):
            following = GEOMETRY.counts[layer + 1 : layer + 3]
            logits = [chance.standard_normal(other).astype(np.float32) for other in following]
            active = np.sort(chance.permutation(count)[:TOP_K]).astype(np.int64)
            # More than there are counts as all.
            found = together.predict_next(layer, logits, active, [TOP_K, 20][: len(logits)], [None] * len(logits))
            for place, (said, k) in enumerate(zip(logits, [TOP_K, 20], strict=False)):
                assert np.array_equal(found[place], one_by_one.predict(layer, 1 + place, said, active, k))
            own = chance.standard_normal(count)
            for predictor in (together, one_by_one):
                predictor.observe(layer, active, own)
    for name, table in together.state().items():
        assert np.array_equal(table, one_by_one.state()[name]), name


def test_a_router_that_knows_is_believed() -> None:
    predictor = Predictor(GEOMETRY, depth=1)
    decode(predictor, 150, router_noise=0.0)
    assert decode(predictor, 50, router_noise=0.0, seed=1) > 0.95
    (skill,) = [skill for skill in predictor.skills() if skill.layer == 1]
    assert skill.router == 1.0
    assert skill.combined > 0.9
    assert skill.previous < 0.6


def test_the_routers_mean_error_is_learnt() -> None:
    predictor = Predictor(GEOMETRY, depth=1)
    before = decode(predictor, 20, router_noise=0.0, shift=2.0)
    decode(predictor, 200, router_noise=0.0, shift=2.0, seed=1)
    assert decode(predictor, 50, router_noise=0.0, shift=2.0, seed=2) > max(0.85, before + 0.1)


def test_transitions_are_learnt_where_routers_know_nothing() -> None:
    predictor = Predictor(GEOMETRY, depth=1)
    chance = np.random.default_rng(3)
    leads_to = chance.permutation(12)
    for _ in range(400):
        active = np.sort(chance.permutation(12)[:TOP_K]).astype(np.int64)
        predictor.predict(0, 1, chance.standard_normal(12), active, TOP_K)
        predictor.observe(0, active)
        predictor.observe(1, np.sort(leads_to[active]).astype(np.int64))
    (skill,) = predictor.skills()
    assert skill.transition > 0.9
    assert skill.combined > 0.7
    assert skill.router < 0.5


def test_the_counts_are_what_they_say() -> None:
    predictor = Predictor(GEOMETRY, depth=2)
    assert predictor.skills() == []
    predictor.predict(0, 2, np.arange(9.0), np.array([1, 2], np.int64), TOP_K)
    predictor.observe(2, np.array([8, 7, 0], np.int64))
    (skill,) = predictor.skills()
    assert (skill.layer, skill.ahead) == (2, 2)
    assert skill.router == pytest.approx(2 / 3)
    assert skill.combined_2k >= skill.combined
    # What was not foreseen again is not counted again.
    predictor.observe(2, np.array([0, 1, 2], np.int64))
    assert predictor.skills() == [skill]


def test_what_was_learnt_is_kept() -> None:
    taught, fresh = Predictor(GEOMETRY, depth=2), Predictor(GEOMETRY, depth=2)
    decode(taught, 60, router_noise=0.5)
    fresh.restore(taught.state())
    logits, active = np.linspace(-1, 1, 12), np.array([0, 4, 5], np.int64)
    for predictor in (taught, fresh):
        predictor.observe(1, np.zeros(0, np.int64))
    found = [predictor.predict(0, 1, logits, active, TOP_K) for predictor in (taught, fresh)]
    # Both saw the same last token but for what led to it.
    assert found[0] == pytest.approx(found[1], abs=5e-3)
    with pytest.raises(ValueError, match="another model"):
        Predictor(Geometry((12, 12)), depth=2).restore(taught.state())
    damaged = taught.state()
    damaged["weights"][0] = np.nan
    before = fresh.state()
    with pytest.raises(ValueError, match="not finite"):
        fresh.restore(damaged)
    assert all(np.array_equal(before[name], array) for name, array in fresh.state().items())
    with pytest.raises(ValueError, match="depth=0"):
        Predictor(GEOMETRY, depth=0)


def test_a_policy_that_knows_is_believed() -> None:
    predictor, deaf = Predictor(GEOMETRY, depth=1), Predictor(GEOMETRY, depth=1)
    chance = np.random.default_rng(11)
    for token in range(300):
        active = np.sort(chance.permutation(12)[:TOP_K]).astype(np.int64)
        needed = np.sort(chance.permutation(12)[:TOP_K]).astype(np.int64)
        expected = np.full(12, 0.1, np.float32)
        expected[needed] = 0.8
        noise = chance.standard_normal(12)
        (found,) = predictor.predict_next(0, [noise], active, [TOP_K], [expected])
        if token > 250:
            assert set(top(found)) == set(needed.tolist())
        (unsaid,) = deaf.predict_next(0, [noise], active, [TOP_K], [None])
        assert np.isfinite(unsaid).all()
        for one in (predictor, deaf):
            one.observe(0, active)
            one.observe(1, needed)
    assert predictor.skills()[0].combined > deaf.skills()[0].combined + 0.3


def lead(predictor: Predictor, tokens: int) -> float:
    """Recall of layer 1, whose experts follow from layer 0's or, more and more, are those of the token before."""
    chance, leads_to = np.random.default_rng(5), np.random.default_rng(6).permutation(12)
    right, active = 0, top(chance.standard_normal(12))
    for _ in range(tokens):
        if chance.random() < 0.3:
            active = top(chance.standard_normal(12))
        needed = np.sort(leads_to[active]).astype(np.int64)
        # A router that knows nothing.
        (found,) = predictor.predict_next(0, [chance.standard_normal(12)], active, [TOP_K], [None])
        right += len(set(top(found)) & set(needed))
        predictor.observe(0, active)
        predictor.observe(1, needed)
    return right / tokens / TOP_K


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_alone_hears_nothing_of_the_others(source: str) -> None:
    predictor, same = Predictor(GEOMETRY, depth=1, source=source), Predictor(GEOMETRY, depth=1, source=source)
    chance = np.random.default_rng(8)
    for _ in range(40):
        logits, active = chance.standard_normal(12), top(chance.standard_normal(12))
        needed = np.sort(chance.permutation(12)[:TOP_K]).astype(np.int64)
        said = logits if source == "router" else chance.standard_normal(12)
        led = active if source in ("router", "transition") else top(chance.standard_normal(12))
        found = predictor.predict(0, 1, logits, active, TOP_K, chance.random(12))
        assert np.array_equal(found, same.predict(0, 1, said, led if source != "router" else active[:0], TOP_K))
        for one in (predictor, same):
            one.observe(0, active)
            one.observe(1, needed)
    weights = predictor.weights[1, 0] != Predictor(GEOMETRY, depth=1).weights[1, 0]
    inputs = {"router": kernel.ROUTER, "transition": kernel.TRANSITION, "previous": kernel.PREVIOUS}
    assert set(np.flatnonzero(weights[kernel.BIAS + 1 :]) + 1) == {inputs.get(source, kernel.POPULAR)}


def test_a_source_alone_predicts_what_it_knows() -> None:
    found = {source: lead(Predictor(GEOMETRY, depth=1, source=source), 300) for source in SOURCES}
    assert found["transition"] > 0.8 and found["previous"] > 0.6
    assert found["router"] < 0.4
    predictor = Predictor(GEOMETRY, depth=1, source="previous")
    lead(predictor, 300)
    (skill,) = predictor.skills()
    assert skill.router == skill.transition == 0.0
    assert skill.previous > 0.6 and skill.combined > 0.6
    with pytest.raises(ValueError, match=r"source='disk': expected auto, router"):
        Predictor(GEOMETRY, source="disk")


def test_names() -> None:
    class Own(Predictor):
        pass

    assert [name_of(Predictor(GEOMETRY, source=source)) for source in ("auto", *SOURCES)] == ["auto", *SOURCES]
    assert name_of(Own(GEOMETRY)) == "Own"
