"""What a routing trace holds, in figures: popularity, locality, hit rates by size of cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.routing import Popularity, popularity_hits
from placement.trace_analysis import decode_hits, expert_counts, fit_popularity
from prefetch.policies.belady import BeladyPolicy
from prefetch.traces.replay import keys_of, replay
from prefetch.traces.trace import RoutingTrace

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the experts, that a cache has slots for."""


@dataclass(frozen=True)
class HitPoint:
    """A cache of some size under decode.

    Attributes:
        share: of the experts, that have a slot.
        slots: as many.
        lru: hit rate of the least-recently-used policy in the second half of decode, by stack distances.
        belady: of the best policy there can be, which knows the future, over all of decode from an empty cache.
        popularity: of least recently used, as follows from the fitted popularity alone.
    """

    share: float
    slots: int
    lru: float
    belady: float
    popularity: float


@dataclass(frozen=True)
class TraceSummary:
    """A trace in figures.

    Attributes:
        name: of the trace.
        layers: that have experts.
        experts: of all layers.
        top_k: experts of a token in each layer.
        passes: forward passes.
        prefill_passes: those of several tokens of a sequence.
        tokens: of all passes.
        decode_tokens: of passes of decode.
        popularity: the stated model that is most like it.
        busiest_tenth: share of tokens that go to the busiest tenth of a layer's experts, mean over layers.
        unused: experts that no token went to.
        hits: by size of cache; empty where there are not two passes of decode.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    passes: int
    prefill_passes: int
    tokens: int
    decode_tokens: int
    popularity: Popularity
    busiest_tenth: float
    unused: int
    hits: tuple[HitPoint, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("popularity", "hits")}
        return {**plain, **vars(self.popularity), "hits": [vars(point) for point in self.hits]}


def summarise(trace: RoutingTrace) -> TraceSummary:
    """The figures of a trace.

    Raises:
        TraceError: fewer than two tokens.
    """
    counts = expert_counts(trace)
    decode = ~trace.pass_prefill
    popularity = fit_popularity(trace)
    busiest = [np.sort(one)[::-1][: max(1, round(len(one) / 10))].sum() / one.sum() for one in counts]
    return TraceSummary(
        name=trace.name,
        layers=trace.geometry.layers,
        experts=trace.geometry.total,
        top_k=trace.top_k,
        passes=trace.passes,
        prefill_passes=int(trace.pass_prefill.sum()),
        tokens=len(trace.experts),
        decode_tokens=int(trace.pass_tokens[decode].sum()),
        popularity=popularity,
        busiest_tenth=float(np.mean(busiest)),
        unused=int(sum((one == 0).sum() for one in counts)),
        hits=_hits(trace, popularity) if decode.sum() >= 2 else (),
    )


def _hits(trace: RoutingTrace, popularity: Popularity) -> tuple[HitPoint, ...]:
    measured = decode_hits(trace)
    rows = int(np.median(trace.pass_tokens[~trace.pass_prefill]))
    layers = tuple((count, min(trace.top_k, count)) for count in trace.geometry.counts)
    stated = popularity_hits(layers, rows, popularity, rows)
    steps = list(trace.steps())
    routes = [keys_of(trace, step) for step in steps]
    points = []
    for share in SHARES:
        slots = max(1, round(share * trace.geometry.total))
        best = replay(trace, BeladyPolicy(routes), slots, steps).decode_hit_rate
        size = np.array([float(slots)])
        points.append(HitPoint(share, slots, float(measured.rate(size)[0]), best, float(stated.rate(size)[0])))
    return tuple(points)
