"""Misses of cache policies on routing traces, between LRU and Belady's optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Report, Row, say
from benchmarks.trace_recording import tiny_model_traces
from prefetch.policies.base import CachePolicy
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.forecast_kernel import LATER_SHARE, LINK_RATE, WEIGHT_RATE
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from prefetch.policies.names import DEFAULT_POLICY, POLICIES
from prefetch.predictors.predictor import Predictor
from prefetch.traces.codec import decode, encode
from prefetch.traces.replay import belady_for, replay
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace

GAP_TARGET = 0.30
WORSE_TARGET = 0.01


@dataclass(frozen=True)
class PolicyScale:
    """How much to replay.

    Attributes:
        new_tokens: decoded tokens of each trace.
        shares: of the experts that fit.
        synthetic: routings that are drawn beside the recorded ones.
    """

    new_tokens: int
    shares: tuple[float, ...]
    synthetic: tuple[SyntheticRouting, ...]


PROMPT_TOKENS = 64
SYNTHETIC = (
    SyntheticRouting(8, 8, 2, skew=0.3),
    SyntheticRouting(12, 64, 6, skew=0.5),
    SyntheticRouting(12, 64, 8, skew=0.2, locality=0.5),
    SyntheticRouting(12, 64, 8, skew=0.8, topic=1.0),
)
FULL = PolicyScale(448, (0.25, 0.5, 0.75), SYNTHETIC)
QUICK = PolicyScale(48, (0.25,), SYNTHETIC[:1])


class _Unlearnt(ForecastPolicy):
    """Ablation: the weights that it starts with stay."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._rates[[WEIGHT_RATE, LINK_RATE]] = 0.0


class _Timeless(ForecastPolicy):
    """Ablation: it does not matter when a layer comes."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._scales[:] = 1.0


class _Unlinked(ForecastPolicy):
    """Ablation: what follows what from token to token is not learnt."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._rates[LINK_RATE] = 0.0


class _NextVisit(ForecastPolicy):
    """Ablation: only the next visit of a layer counts."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._rates[LATER_SHARE] = 0.0


ABLATIONS: dict[str, Callable[[Geometry], CachePolicy]] = {
    "forecast, not learning": _Unlearnt,
    "forecast, no links": _Unlinked,
    "forecast, next visit only": _NextVisit,
    "forecast, without time": _Timeless,
}

TOLD = "forecast, told of 3 layers"
"""By a predictor that asks the routers, as a runtime that reads ahead does."""


def run(scale: PolicyScale) -> Report:
    """The benchmark."""
    report = Report("cache_policies")
    say("recording the tiny model")
    traces = list(tiny_model_traces(PROMPT_TOKENS, scale.new_tokens))
    recorded = {trace.name for trace in traces}
    traces += [draw(routing, PROMPT_TOKENS, scale.new_tokens, seed=1) for routing in scale.synthetic]
    for trace in traces:
        again = decode(encode(trace))
        same = again.name == trace.name and np.array_equal(again.experts, trace.experts)
        report.gate(f"trace {trace.name}", same, f"{len(encode(trace)):,} bytes survive their format")
    gaps: dict[tuple[float, str], list[float]] = {}
    worst: dict[tuple[float, str], float] = {}
    for share in scale.shares:
        for trace in traces:
            say(f"{share:.0%} of {trace.name}")
            row = _row(trace, share, gaps, worst, counted=trace.name in recorded)
            report.tables.setdefault("Misses of routed experts, decode", []).append(row)
    _summary(report, gaps, worst)
    report.notes.append(
        f"{PROMPT_TOKENS} tokens of prefill, then {scale.new_tokens} of decode, from an empty cache. Traces that are "
        "named synthetic are drawn, not run. Belady knows the future. The gap closed is (LRU - policy) / "
        "(LRU - Belady), prefill included; its average is over recorded traces."
    )
    return report


def _makers() -> dict[str, Callable[[Geometry], CachePolicy]]:
    def named(name: str) -> Callable[[Geometry], CachePolicy]:
        return lambda geometry: make_policy(name, geometry)

    return {**{name: named(name) for name in POLICIES}, **ABLATIONS}


def _row(
    trace: RoutingTrace,
    share: float,
    gaps: dict[tuple[float, str], list[float]],
    worst: dict[tuple[float, str], float],
    *,
    counted: bool,
) -> Row:
    slots = max(trace.top_k, round(share * trace.geometry.total))
    found = {name: replay(trace, make(trace.geometry), slots) for name, make in _makers().items()}
    if trace.ahead is not None:
        predictor = Predictor(trace.geometry, trace.depth)
        found[TOLD] = replay(trace, make_policy(DEFAULT_POLICY, trace.geometry), slots, predictor=predictor)
    least = replay(trace, belady_for(trace), slots)
    lru = found["lru"]
    for name, one in found.items():
        if counted:
            gap = (lru.misses - one.misses) / (lru.misses - least.misses) if lru.misses > least.misses else 0.0
            gaps.setdefault((share, name), []).append(gap)
        worst[share, name] = max(worst.get((share, name), -1.0), one.misses / lru.misses - 1.0)
    decoded = {name: one.decode_misses for name, one in found.items() if name in POLICIES}
    return {"trace": trace.name, "cached": f"{share:.0%}", **decoded, "belady": least.decode_misses}


def _summary(report: Report, gaps: dict[tuple[float, str], list[float]], worst: dict[tuple[float, str], float]) -> None:
    report.tables["Share of the gap from LRU to Belady that is closed, on recorded traces"] = [
        {
            "cached": f"{share:.0%}",
            "policy": name,
            "closed": float(np.mean(found)),
            "least": min(found),
            "most": max(found),
            "worst misses against LRU, all traces": worst[share, name],
        }
        for (share, name), found in gaps.items()
    ]
    closed = float(np.mean(gaps[0.25, DEFAULT_POLICY]))
    report.target("gap closed by the default policy at 25%, recorded traces", closed, "at least", GAP_TARGET)
    most = max(value for (_, name), value in worst.items() if name == DEFAULT_POLICY)
    report.target("worst excess of misses over LRU, any trace and size", most, "at most", WORSE_TARGET)
