"""What is decided in one compiled call is what the policy and the predictor decide when they are asked one by one."""

from __future__ import annotations

import threading
from typing import Any, cast

import numpy as np
import pytest

from offload.devices.host import HostDevice
from offload.prefetcher import Prefetcher
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.slot_table import SlotState
from offload.tiers.transfer import ReadRequest, Urgency
from prefetch.foresight import Foresight
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.lru import LruPolicy
from prefetch.predictors.predictor import Predictor

PAGE = 4096
GEOMETRIES = [Geometry((12, 12, 9, 12, 3)), Geometry((70, 5, 64)), Geometry((6,) * 8)]


class Replaced(ForecastPolicy):
    """A user's own."""


class Read:
    """One that ends when it is told to."""

    error = None

    def __init__(self, key: int, *, begun: bool) -> None:
        self.key, self.begun, self.finished, self.succeeded = key, begun, False, False

    def end(self, *, arrived: bool) -> None:
        self.finished, self.succeeded = True, arrived


class Tier(ExpertTier):
    """Says what was done; what is read arrives when it is told to."""

    def __init__(self, policy: ForecastPolicy, slots: int) -> None:
        self.did: list[tuple[str, int]] = []
        self.reading_s = 0.0
        super().__init__(
            Arena(HostDevice(), PAGE, slots), policy, cast("Any", self),
            lambda key, out: ReadRequest(key, 0, out, None, ""), lambda _key: PAGE,
        )  # fmt: skip

    def submit(self, request: ReadRequest, _urgency: Urgency) -> Read:
        """See `Engine`."""
        self.did.append(("read", request.shard))
        return Read(request.shard, begun=len(self.did) % 3 == 0)

    def cancel(self, ticket: Read) -> None:
        """See `Engine`."""
        self.did.append(("cancel", ticket.key))
        ticket.end(arrived=False)

    def arrive(self, key: int) -> None:
        cast("Any", self._tickets[key]).end(arrived=True)
        self._settle(key)

    def _evict(self, key: int) -> None:
        self.did.append(("evict", key))
        super()._evict(key)


class Run:
    """A model whose layers' routing is foreseen more or less well."""

    def __init__(
        self, policy: ForecastPolicy, geometry: Geometry, slots: int, top_k: int, source: str = "auto"
    ) -> None:
        self.tier = Tier(policy, slots)
        self.geometry, self.predictor = geometry, Predictor(geometry, source=source)
        k = [min(top_k, count) for count in geometry.counts]
        self.prefetcher = Prefetcher(self.tier, self.predictor, k, None, threading.RLock())

    def step(self, layer: int, said: np.ndarray, active: np.ndarray, arriving: float, seed: int) -> None:
        tier, first = self.tier, int(self.geometry.first_keys[layer])
        chance = np.random.default_rng(seed)
        for key in list(tier.reading_ahead):
            if chance.random() < arriving:
                tier.arrive(key)
        self.prefetcher.note_router(layer, active, lambda: said)
        keys = (first + active).tolist()
        for key in keys:
            # What is needed is read ahead no longer.
            if key in tier.reading_ahead:
                tier.arrive(key)
        _, missing = tier.borrow(keys)
        assert tier.start_loads(missing) == len(missing)
        tier.reading_s += 0.0003 * len(missing)
        self.prefetcher.read_ahead(layer)
        for key in missing:
            tier.arrive(key)
        assert tier.poll(missing) == missing
        tier.give_back(keys)
        self.prefetcher.observe(layer, active)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("seed", "source"), [*((seed, "auto") for seed in range(4)), (4, "router"), (5, "previous")])
def test_reads_cancels_and_victims_are_those_of_python(geometry: Geometry, seed: int, source: str) -> None:
    chance = np.random.default_rng(seed)
    top_k = 3
    slots = int(chance.integers(top_k + 6, max(top_k + 7, geometry.total // 2)))
    compiled = Run(ForecastPolicy(geometry), geometry, slots, top_k, source)
    by_python = Run(Replaced(geometry), geometry, slots, top_k, source)
    assert compiled.prefetcher._foresight is not None and by_python.prefetcher._foresight is None
    runs = (compiled, by_python)
    if seed == 3:
        for run in runs:
            run.tier.policy.set_quotas([max(1, slots // geometry.layers)] * geometry.layers)
    noise, walk = float(chance.uniform(0.0, 0.8)), [chance.standard_normal(count) for count in geometry.counts]
    most = max(geometry.counts)
    for token in range(60):
        walk = [0.7 * logits + 0.7 * chance.standard_normal(len(logits)) for logits in walk]
        for layer, logits in enumerate(walk):
            active = np.sort(np.argsort(-logits)[:top_k]).astype(np.int64)
            said = np.zeros((min(4, geometry.layers - layer), most), np.float32)
            for place, other in enumerate(walk[layer : layer + len(said)]):
                said[place, : len(other)] = 2 * (other + noise * place * chance.standard_normal(len(other)))
            arriving, of_arrival = float(chance.random()), int(chance.integers(1 << 30))
            for run in runs:
                run.step(layer, said, active, arriving, of_arrival)
            assert compiled.tier.did == by_python.tier.did, (token, layer)
        for run in runs:
            run.prefetcher.note_pass(0.004)
    tables = [run.tier.policy for run in runs]
    assert np.array_equal(tables[0].values, tables[1].values) and np.array_equal(tables[0].fixed, tables[1].fixed)
    held = [key for key in compiled.tier.table if compiled.tier.table.state_of(key) is not SlotState.READY]
    assert tables[0].victims(held, slots) == tables[1].victims(held, slots)
    for name, table in compiled.predictor.state().items():
        assert np.array_equal(table, by_python.predictor.state()[name]), name
    done = {kind for kind, _ in compiled.tier.did}
    assert {"read", "evict"} <= done


def test_cases_have_cancels_and_reads_ahead() -> None:
    """What the comparison above is worth."""
    geometry = GEOMETRIES[0]
    run = Run(ForecastPolicy(geometry), geometry, 32, 3)
    chance = np.random.default_rng(0)
    ahead = 0
    for _ in range(40):
        logits = [chance.standard_normal(count) for count in geometry.counts]
        for layer, own in enumerate(logits):
            said = np.zeros((min(4, geometry.layers - layer), 12), np.float32)
            for place, other in enumerate(logits[layer : layer + len(said)]):
                said[place, : len(other)] = 3 * (other + (place == 2) * chance.standard_normal(len(other)))
            run.step(layer, said, np.sort(np.argsort(-own)[:3]).astype(np.int64), 0.3, layer)
            ahead += len(run.tier.reading_ahead)
        run.prefetcher.note_pass(0.004)
    assert ahead > 20
    assert sum(kind == "cancel" for kind, _ in run.tier.did) > 5


def test_only_what_it_knows_is_taken() -> None:
    geometry = GEOMETRIES[0]
    policy, predictor = ForecastPolicy(geometry), Predictor(geometry)
    assert Foresight.takes(policy, predictor)
    assert not Foresight.takes(Replaced(geometry), predictor)
    assert not Foresight.takes(LruPolicy(), predictor)
    with pytest.raises(ValueError, match="decide in Python"):
        Foresight(Replaced(geometry), predictor, [3] * 5, least=0.6, sure=0.8, cancel_below=0.1)
