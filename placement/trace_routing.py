"""From a recorded trace to what predictions know of routing."""

from __future__ import annotations

from placement.model_spec import ModelSpec
from placement.policy_hits import policy_hits
from placement.predict import Routing
from placement.trace_analysis import fit_popularity
from prefetch.traces.trace import RoutingTrace, TraceError


def routing_of(trace: RoutingTrace, spec: ModelSpec, policy: str = "auto") -> Routing:
    """Hit rates of decode by a replay of the trace, everything else by the popularity that is most like it.

    Args:
        trace: of this model, with passes of decode; hit rates are for passes of as many tokens as most of these have.
        spec: of the model.
        policy: name of the runtime's cache policy.

    Raises:
        TraceError: another model's trace, or one that is too short.
    """
    counts = tuple(layer.count for layer in spec.experts)
    top_k = {layer.top_k for layer in spec.experts}
    if trace.geometry.counts != counts or top_k != {trace.top_k}:
        raise TraceError(
            f"the trace {trace.name!r} is of {trace.geometry.layers} layers with {sorted(set(trace.geometry.counts))} "
            f"experts and top {trace.top_k}; {spec.name} has {len(counts)} with {sorted(set(counts))} and top "
            f"{sorted(top_k)}; record one of this model"
        )
    popularity = fit_popularity(trace)
    hits = policy_hits(trace, policy)
    rows = sorted(trace.pass_tokens[~trace.pass_prefill].tolist())[int((~trace.pass_prefill).sum()) // 2]
    source = (
        f"the trace {trace.name!r} of {len(trace.experts)} tokens; popularity like rank^-{popularity.skew:.2f}, "
        f"{popularity.locality:.0%} repeated"
    )
    return Routing(popularity, hits, source, rows)
