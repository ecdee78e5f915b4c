"""A trace run against a cache policy: what a tier of so many slots would hit and miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefetch.policies.base import CachePolicy
from prefetch.policies.belady import BeladyPolicy
from prefetch.predictors.predictor import Predictor
from prefetch.traces.trace import LayerStep, RoutingTrace


@dataclass(frozen=True)
class Replay:
    """Routed experts, once per layer and pass, by what the tier had."""

    prefill_hits: int
    prefill_misses: int
    decode_hits: int
    decode_misses: int

    @property
    def misses(self) -> int:
        """Of both kinds of passes."""
        return self.prefill_misses + self.decode_misses

    @property
    def hit_rate(self) -> float:
        """Hits of all routed experts; 0 where there were none."""
        hits = self.prefill_hits + self.decode_hits
        return hits / (hits + self.misses) if hits + self.misses else 0.0

    @property
    def decode_hit_rate(self) -> float:
        """Hits of the experts that decode was routed to; 0 where there were none."""
        needed = self.decode_hits + self.decode_misses
        return self.decode_hits / needed if needed else 0.0


class CacheModel:
    """The slots of a tier and a policy; makes the calls that `ExpertTier` makes in a step, in the same order."""

    def __init__(self, policy: CachePolicy, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots: need at least one")
        self.policy = policy
        self.slots = slots
        self.resident: set[int] = set()
        policy.on_resize(slots)

    def step(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> list[int]:
        """A layer needs `keys`; those that were not here. They are here afterwards, as far as slots go."""
        self.policy.on_route(keys, shares)
        missing = [key for key in keys if key not in self.resident]
        waiting = missing
        held = set(keys)
        while waiting:
            loaded = self.load(waiting, held)
            # What was here is computed now, what was just loaded next: both may give way from then on.
            held = set(waiting[loaded:]) if loaded < len(waiting) else set()
            waiting = waiting[loaded:]
        return missing

    def drop(self, key: int) -> None:
        """A resident expert loses its slot."""
        self.policy.on_evict(key)
        self.resident.remove(key)

    def load(self, waiting: Sequence[int], held: set[int]) -> int:
        """Give experts slots, in order; how many got one. Those that are held keep theirs."""
        free = self.slots - len(self.resident)
        victims = self.policy.victims(held, len(waiting) - free) if len(waiting) > free else []
        for victim in victims:
            self.drop(victim)
        loaded = min(len(waiting), self.slots - len(self.resident))
        for key in waiting[:loaded]:
            self.policy.on_insert(key)
            self.resident.add(key)
        return loaded


def keys_of(trace: RoutingTrace, step: LayerStep) -> list[int]:
    """The keys of a step's experts."""
    first = int(trace.geometry.first_keys[step.layer])
    return [first + expert for expert in step.experts.tolist()]


def replay(
    trace: RoutingTrace,
    policy: CachePolicy,
    slots: int,
    steps: Sequence[LayerStep] | None = None,
    predictor: Predictor | None = None,
) -> Replay:
    """Run the whole trace, from an empty cache.

    Args:
        trace: the routing.
        policy: new, or as another trace left it, with an empty cache.
        slots: of the cache.
        steps: the trace's, where the caller has them already.
        predictor: tells the policy of layers to come, as a runtime's look ahead does; learns meanwhile. None for a
            policy that is told nothing.

    Raises:
        ValueError: there is a predictor, and the trace has no logits ahead.
    """
    if predictor is not None and trace.ahead is None:
        raise ValueError(f"trace {trace.name!r} has no logits of later routers, which a predictor needs")
    model = CacheModel(policy, slots)
    counted = {True: [0, 0], False: [0, 0]}
    for place, step in enumerate(trace.steps() if steps is None else steps):
        told = predictor if step.tokens == 1 else None
        if told is not None:
            _foresee(trace, place // trace.geometry.layers, step, told, policy)
        keys = keys_of(trace, step)
        missing = len(model.step(keys, step.shares))
        counted[step.prefill][0] += len(keys) - missing
        counted[step.prefill][1] += missing
        if step.scores is not None:
            policy.on_scores(int(trace.geometry.first_keys[step.layer]), step.scores)
        if told is not None:
            # Logits but for a constant, which no prediction depends on.
            logits = None if step.scores is None else np.log(np.maximum(step.scores.astype(np.float64), 1e-7))
            told.observe(step.layer, step.experts, logits)
    return Replay(*counted[True], *counted[False])


def _foresee(trace: RoutingTrace, index: int, step: LayerStep, predictor: Predictor, policy: CachePolicy) -> None:
    """What the router of one layer lets foresee of the next ones."""
    assert trace.ahead is not None
    for ahead in range(1, min(predictor.depth, trace.depth, trace.geometry.layers - 1 - step.layer) + 1):
        target = step.layer + ahead
        logits = trace.ahead[index, step.layer, ahead - 1, : trace.geometry.counts[target]].astype(np.float64)
        first_key = int(trace.geometry.first_keys[target])
        expected = policy.expected(first_key)
        probabilities = predictor.predict(step.layer, ahead, logits, step.experts, trace.top_k, expected)
        policy.on_forecast(first_key, probabilities)


def belady_for(trace: RoutingTrace) -> BeladyPolicy:
    """The bound: a policy that knows the whole trace."""
    return BeladyPolicy([keys_of(trace, step) for step in trace.steps()])
