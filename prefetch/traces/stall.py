"""What a run would wait for reads if layers to come were known: a trace against a policy, a disk and a clock."""

from __future__ import annotations

from dataclasses import dataclass

from prefetch.policies.base import CachePolicy
from prefetch.traces.replay import CacheModel, keys_of
from prefetch.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds.

    Attributes:
        read_s: one expert from disk, at the disk's full bandwidth; reads go one after another.
        experts_s: the computation of a layer's experts.
        between_s: everything between the experts of one layer and the router of the next.
    """

    read_s: float
    experts_s: float
    between_s: float


@dataclass(frozen=True)
class Stalls:
    """Of decoded tokens.

    Attributes:
        stall_s: seconds in which there was nothing to compute.
        seconds: in all.
        reads: experts read.
        tokens: passes.
    """

    stall_s: float
    seconds: float
    reads: int
    tokens: int


def replay_stalls(
    trace: RoutingTrace, policy: CachePolicy, slots: int, pace: Pace, *, oracle_layers: int, warm_passes: int = 0
) -> Stalls:
    """Decode a trace with an oracle that knows the next layers' experts when a layer's router has run.

    A layer's own misses are read first, then what the oracle names, nearest layer first; nothing is read in vain. A
    layer's experts in RAM are computed while others arrive.

    Args:
        trace: the routing; passes of several tokens are not timed, but change the cache.
        policy: new.
        slots: of the cache.
        pace: of disk and computation.
        oracle_layers: known ahead; 0 for no reading ahead.
        warm_passes: passes that are left out of the figures.
    """
    cache = CacheModel(policy, slots)
    steps = list(trace.steps())
    layers = trace.geometry.layers
    arrives: dict[int, float] = {}
    clock = disk = stall = 0.0
    start, reads = 0.0, 0
    for place, step in enumerate(steps):
        if place == warm_passes * layers:
            start, stall, reads = clock, 0.0, 0
        keys = keys_of(trace, step)
        wanted = cache.step(keys, step.shares)
        known = [keys_of(trace, other) for other in steps[place + 1 : place + 1 + oracle_layers]]
        held = set(keys).union(*known)
        for following in known:
            absent = [key for key in following if key not in cache.resident]
            wanted += absent[: cache.load(absent, held)]
        for key in wanted:
            disk = max(disk, clock) + pace.read_s
            arrives[key] = disk
        reads += len(wanted)
        ready = max((arrives.pop(key, 0.0) for key in keys), default=0.0)
        computed = clock + pace.experts_s
        # The last to arrive is computed alone.
        done = max(computed, ready + pace.experts_s / max(len(keys), 1))
        if not step.prefill:
            stall += done - computed
        clock = done + pace.between_s
    return Stalls(stall, clock - start, reads, max(0, trace.passes - warm_passes))
