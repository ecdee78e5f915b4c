"""A model's layers on a CPU, a GPU and a link, second by second: what scheduling, prefetching and caching are worth.

The runtime's own scheduler and cache policies decide. Nothing is computed; a layer takes what its schedule takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.ablation_machine import Model
from prefetch.impact import best_copy, loss_s
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from prefetch.scheduler.records import Home
from prefetch.scheduler.scheduler import LayerScheduler, all_on_cpu, all_transferred
from prefetch.traces.trace import LayerStep, RoutingTrace

Ints = npt.NDArray[np.int64]
Wanted = tuple[int, float, int]
"""(key, seconds that it saves the layer that it is meant for, that layer or LATER)"""

LATER = -1
"""For no layer of this pass."""

MOST_AHEAD = 4
"""Copies for one layer: more do not arrive in time."""

RECALL = 0.85
"""Share of the next layer's experts that a prediction has; published of routers asked early: 0.79 to 0.89."""


@dataclass(frozen=True)
class Parts:
    """What is switched on.

    Attributes:
        copy_all: the static mapping that copies all misses, instead of the one that leaves them to the CPU.
        scheduling: misses are copied or computed on the CPU, as the scheduler says; otherwise on the CPU.
        prefetch: the next layer's experts are copied while the link is idle.
        caching: the runtime's default score instead of LRU decides what leaves, and experts that missed are copied
            while the link is idle where they score above what would leave.
    """

    copy_all: bool = False
    scheduling: bool = False
    prefetch: bool = False
    caching: bool = False


class Simulation:
    """One machine with one cache."""

    def __init__(self, model: Model, cached: float, parts: Parts, popular: Ints, seed: int) -> None:
        """Start with the most popular experts of each layer on the GPU, as a static mapping has them.

        Args:
            model: its shapes and costs.
            cached: share of experts that the GPU holds.
            parts: what is on.
            popular: int64 [layers, experts], ids by popularity, descending.
            seed: of predictions.
        """
        self.model, self.parts = model, parts
        self.costs = model.costs
        # Without scheduling nothing is copied in a layer.
        self.scheduler = LayerScheduler(
            self.costs if parts.scheduling or parts.copy_all else replace(self.costs, link_expert_s=float("inf"))
        )
        count = max(1, round(cached * model.experts))
        self.resident = {
            layer * model.experts + int(expert) for layer in range(model.layers) for expert in popular[layer, :count]
        }
        self.seconds = 0.0
        self.copies = 0
        self._chance = np.random.default_rng(seed)
        self.policy = make_policy("auto" if parts.caching else "lru", Geometry.uniform(model.layers, model.experts))
        self.policy.on_resize(len(self.resident))
        for key in sorted(self.resident):
            self.policy.on_insert(key)
        # A copy ahead that the link has begun: (key, seconds that it still takes, layer that it is for or -1).
        self._running: tuple[int, float, int] | None = None

    def run(self, trace: RoutingTrace, first_pass: int = 0) -> float:
        """Seconds of a trace's passes from `first_pass` on."""
        steps = list(trace.steps())
        begun = self.seconds
        for number, step in enumerate(steps):
            if number == first_pass * self.model.layers:
                begun = self.seconds
            following = steps[number + 1] if step.layer + 1 < self.model.layers else None
            self._layer(step, following)
        return self.seconds - begun

    def _layer(self, step: LayerStep, following: LayerStep | None) -> None:
        first = step.layer * self.model.experts
        experts, loads = step.experts, step.loads.astype(np.int64)
        keys = (first + experts).tolist()
        self.policy.on_route(keys, step.shares)
        homes = np.array([self._home(key) for key in keys], np.int64)
        if self.parts.scheduling:
            plan = self.scheduler.schedule(loads, homes)
        else:
            static = all_transferred(homes) if self.parts.copy_all else all_on_cpu(homes)
            plan = self.scheduler.execute(static, loads, homes)
        for place in plan.transfers.tolist():
            self._insert(keys[place], set(keys))
        dense_s = self.model.dense_s(step.tokens)
        idle_s = plan.makespan_s - len(plan.transfers) * self.costs.link_expert_s + dense_s
        wanted = self._wanted(step.layer, following) if self.parts.prefetch else []
        if self.parts.caching:
            wanted += [(key, 0.0, LATER) for key in keys if key not in self.resident]
        self._copy_while_idle(idle_s, wanted, step.layer + 1)
        self.seconds += plan.makespan_s + dense_s

    def _wanted(self, layer: int, following: LayerStep | None) -> list[Wanted]:
        """Predicted experts of the next layer that its schedule would be shorter with, the best first."""
        if following is None:
            return []
        first = (layer + 1) * self.model.experts
        experts, loads = self._predict(following)
        chances = np.full(len(experts), RECALL)
        told = np.full(self.model.experts, (1 - RECALL) * len(experts) / self.model.experts)
        told[experts] = RECALL
        self.policy.on_forecast(first, told)
        homes = np.array([self._home(first + expert) for expert in experts.tolist()], np.int64)
        found: list[Wanted] = []
        while len(found) < MOST_AHEAD:
            place, gain_s = best_copy(self.scheduler, loads, homes, chances)
            if place < 0:
                break
            homes[place] = Home.BOTH
            found.append((first + int(experts[place]), gain_s, layer + 1))
        return found

    def _predict(self, step: LayerStep) -> tuple[Ints, Ints]:
        """The layer's experts and loads as predicted: each pair is right with RECALL, otherwise anywhere."""
        loads = np.zeros(self.model.experts, np.int64)
        for expert, load in zip(step.experts.tolist(), step.loads.tolist(), strict=True):
            right = int(self._chance.binomial(load, RECALL))
            loads[expert] += right
            np.add.at(loads, self._chance.integers(0, self.model.experts, load - right), 1)
        experts = np.flatnonzero(loads)
        return experts, loads[experts]

    def _copy_while_idle(self, idle_s: float, wanted: list[Wanted], next_layer: int) -> None:
        """What arrives before the next layer is there; one copy may go on beyond it, unless it was for that layer."""
        pending = iter(wanted)
        while idle_s > 0:
            if self._running is None:
                nxt = next(pending, None)
                if nxt is None:
                    return
                key, gain_s, layer = nxt
                if key in self.resident or not self._pays(key, gain_s, layer):
                    continue
                if layer == next_layer and idle_s < self.costs.link_expert_s:
                    continue
                self._running = (key, self.costs.link_expert_s, layer)
            key, left_s, layer = self._running
            if left_s > idle_s:
                self._running = (key, left_s - idle_s, layer)
                return
            idle_s -= left_s
            self._running = None
            if key not in self.resident:
                self._insert(key, {key})

    def _pays(self, key: int, gain_s: float, layer: int) -> bool:
        """Whether having `key` gains more than its victim loses."""
        victim = self.policy.victim(())
        if victim is None:
            return False
        if layer != LATER:
            return gain_s > loss_s(self.scheduler, self.policy, victim, key, RECALL)
        worth, loss = self.policy.worth(key), self.policy.worth(victim)
        return worth is None or loss is None or worth > loss

    def _insert(self, key: int, held: set[int]) -> None:
        victim = self.policy.victim(held)
        if victim is None:
            return
        self.policy.on_evict(victim)
        self.resident.discard(victim)
        self.policy.on_insert(key)
        self.resident.add(key)
        self.copies += 1

    def _home(self, key: int) -> Home:
        return Home.BOTH if key in self.resident else Home.RAM
