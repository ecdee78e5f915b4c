"""The hit rate of decode that a cache policy has on a recorded trace, by slots.

The trace is replayed against the policy at some sizes of the cache, through the cache that the simulator has; between
them rates run straight. Where every expert has a slot all are there, as the runtime loads them.

A long trace of a large model is replayed in part: its last passes, and some of its layers, with slots in proportion.
Layers use slots alike, so a few stand for all (as samples of keys do in Waldspurger and others, "Cache modeling and
optimization using miniature simulations", 2017). What a layer just read takes slots whatever the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement.kept_hits import PASSING
from placement.routing import FloatArray, HitCurve
from placement.trace_analysis import decode_hits
from prefetch.policies.geometry import Geometry
from prefetch.policies.names import DEFAULT_POLICY
from prefetch.traces.replay import CacheModel, keys_of
from prefetch.traces.trace import RoutingTrace, TraceError

SHARES = (0.03, 0.06, 0.1, 0.17, 0.28, 0.45, 0.65, 0.85)
"""Of the experts that have a slot where the trace is replayed: closer where a slot more finds most more."""

MOST_STEPS, MOST_EXPERTS = 1200, 10_000
"""Layers of passes, and experts that they need, of which no more are replayed at each size: a second for all sizes."""

_FEWEST_LAYERS = 8
"""Of a part of a trace, where it has as many: passes are left out before layers are."""


def policy_hits(trace: RoutingTrace, policy: str = "auto") -> HitCurve:
    """The hit curve of decode after the first half of its passes, as `trace_analysis.decode_hits` counts.

    Args:
        trace: with two passes of decode or more.
        policy: name of the runtime's cache policy.

    Raises:
        TraceError: fewer than two passes of decode.
        UnknownPolicyError: on use, where no policy has this name.
    """
    if policy == "lru":
        return decode_hits(trace)
    if (~trace.pass_prefill).sum() < 2:
        raise TraceError(f"{trace.name}: a hit rate needs two passes of decode or more; record a longer run")
    return PolicyHits(trace, DEFAULT_POLICY if policy == "auto" else policy)


@dataclass(frozen=True, eq=False)
class PolicyHits:
    """See `policy_hits`; replayed when a rate is first asked for, and then known for every number of slots.

    Attributes:
        trace: the routing.
        policy: name of a cache policy.
    """

    trace: RoutingTrace
    policy: str

    def rate(self, slots: FloatArray) -> FloatArray:
        """See `HitCurve`."""
        at, rates = self._points
        return np.interp(np.asarray(slots, dtype=np.float64), at, rates)

    @cached_property
    def _points(self) -> tuple[FloatArray, FloatArray]:
        """(numbers of slots, hit rates), both ascending."""
        part = part_of(self.trace)
        total, experts = self.trace.geometry.total, part.geometry.total
        passing = PASSING * _needed(part)
        at, rates = [0.0], [0.0]
        for share in SHARES:
            slots = passing + (share * total - passing) * experts / total
            at.append(share * total)
            rates.append(_replayed(part, self.policy, max(1, round(slots))))
        # A replay is of one trace: by chance a larger cache may find less in it, which no plan should be told.
        return np.array([*at, float(total)]), np.maximum.accumulate([*rates, 1.0])


def _needed(trace: RoutingTrace) -> float:
    """Experts of a layer that a pass of decode needs, on average."""
    decodes = np.flatnonzero(~trace.pass_prefill)
    return float(np.mean([len(trace.step(index, 0).experts) for index in decodes.tolist()]))


def part_of(trace: RoutingTrace) -> RoutingTrace:
    """The last passes of a trace, and layers at equal distances, of which no more than MOST_STEPS steps come."""
    layers = trace.geometry.layers
    most_steps = min(MOST_STEPS, int(MOST_EXPERTS / _needed(trace)))
    if trace.passes * layers <= most_steps:
        return trace
    kept = min(layers, max(_FEWEST_LAYERS, most_steps // trace.passes))
    passes = min(trace.passes, max(2, most_steps // kept))
    chosen = np.linspace(0, layers - 1, kept).round().astype(np.int64)
    first = trace.pass_starts[trace.passes - passes]
    counts = tuple(trace.geometry.counts[layer] for layer in chosen)
    scores = None if trace.scores is None else trace.scores[-passes:, chosen, : max(counts)]
    return RoutingTrace(
        trace.name, Geometry(counts), trace.top_k, trace.pass_tokens[-passes:], trace.pass_prefill[-passes:],
        trace.experts[first:, chosen], scores,
    )  # fmt: skip


def _replayed(trace: RoutingTrace, policy: str, slots: int) -> float:
    """The hit rate of the second half of decode."""
    # Policies bring compiled kernels, which a plan without a trace does not need.
    from prefetch.policies.named import make_policy

    cache = CacheModel(make_policy(policy, trace.geometry), slots)
    decodes = ~trace.pass_prefill
    late = decodes & (np.cumsum(decodes) > decodes.sum() // 2)
    needed = missed = 0
    for index in range(trace.passes):
        for layer in range(trace.geometry.layers):
            step = trace.step(index, layer)
            keys = keys_of(trace, step)
            missing = cache.step(keys, step.shares)
            if step.scores is not None:
                cache.policy.on_scores(int(trace.geometry.first_keys[layer]), step.scores)
            if late[index]:
                needed += len(keys)
                missed += len(missing)
    return 1 - missed / needed
