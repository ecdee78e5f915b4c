"""What deciding costs: the intra-layer scheduler and the cache policies a layer, the default policy a token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

import offload
from benchmarks.checkpoints import Shape, budget_for, ensure_checkpoint, random_tokens, store_root
from benchmarks.equality import gate_same_bits
from benchmarks.harness import Report, Spread, interleave, ratios, say
from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from prefetch.policies.names import DEFAULT_POLICY, POLICIES
from prefetch.scheduler.records import Home, LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler, all_on_cpu

SCHEDULER_TARGETS_US = {8: 10.0, 64: 60.0}
POLICY_TARGET_US = 20.0
ACTIVE = 8
MISSING = 4


@dataclass(frozen=True)
class DecisionScale:
    """How much to decide.

    Attributes:
        schedules: layers that are scheduled, of each kind.
        layers: of the models whose experts policies choose among.
        experts: of each layer, one number for each model; the targets are the first one's.
        tokens: decoded of each model.
        flush_nbytes: read between two decisions, as experts' weights are: the CPU's caches hold nothing else then.
        shape: of the model that decodes.
        shares: of its experts that have a slot.
        turn_tokens: decoded in a turn.
        rounds: turns of each policy.
    """

    schedules: int
    layers: int
    experts: tuple[int, ...]
    tokens: int
    flush_nbytes: int
    shape: Shape
    shares: tuple[float, ...]
    turn_tokens: int
    rounds: int


MANY_SMALL_EXPERTS = Shape(
    layers=48, hidden=256, experts=128, expert_intermediate=128, top_k=8, heads=4, kv_heads=2, head_dim=64, vocab=4000
)
"""Qwen3-30B-A3B's layers and experts, each expert a 48th as large: nearly all that is left is what deciding costs."""

FULL = DecisionScale(2000, 48, (256, 128), 8, 32 << 20, MANY_SMALL_EXPERTS, (0.25, 0.5), 24, 5)
QUICK = DecisionScale(
    50, 3, (16,), 4, 1 << 20,
    Shape(
        layers=2, hidden=64, experts=8, expert_intermediate=64, top_k=2, heads=2, kv_heads=1, head_dim=32, vocab=100
    ),
    (0.5,), 4, 2,
)  # fmt: skip


def run(work: Path, scale: DecisionScale) -> Report:
    """The benchmark."""
    report = Report("decision_cost")
    say("scheduling")
    _schedulers(report, scale.schedules)
    for experts in scale.experts:
        geometry = Geometry.uniform(scale.layers, experts)
        for name in POLICIES:
            say(f"{name}, {scale.layers} layers of {experts} experts")
            _policy(report, name, geometry, scale, has_target=experts == scale.experts[0])
    checkpoint = ensure_checkpoint(scale.shape, work)
    for share in scale.shares:
        say(f"decoding with {share:.0%} of the experts")
        _decode(report, checkpoint, work, share, scale)
    report.notes.append(
        "Decoded: random weights and tokens, so that no policy can foresee anything and what differs is what they cost."
    )
    report.notes.append(
        "Microseconds of a decision with everything that Python adds, median and range. Policies: a layer is routed to "
        f"{ACTIVE} experts of which {MISSING} are missing, a quarter of the experts is resident; told of the routing, "
        f"asked for victims, told of each that goes and comes. Cold: {scale.flush_nbytes >> 20} MiB are read before "
        "each decision, as experts are between two layers."
    )
    return report


def _schedulers(report: Report, repeats: int) -> None:
    for count, bound in SCHEDULER_TARGETS_US.items():
        slowest = 0.0
        for phase in ("decode", "prefill"):
            for disk in (False, True):
                spread = _schedule_us(report, count, repeats, prefill=phase == "prefill", disk=disk)
                slowest = max(slowest, spread.median)
                report.tables.setdefault("Scheduler, a layer", []).append(
                    {"active experts": count, "phase": phase, "from": "disk too" if disk else "memory", "us": spread}
                )
        report.target(f"scheduler, {count} active experts, us", slowest, "at most", bound)


def _schedule_us(report: Report, count: int, repeats: int, *, prefill: bool, disk: bool) -> Spread:
    chance = np.random.default_rng(count)
    costs = LayerCosts(
        cpu_token_s=1.0, gpu_expert_s=0.2, gpu_token_s=0.01, link_expert_s=1.5, disk_expert_s=3.0 if disk else 0.0
    )
    scheduler = LayerScheduler(costs)
    layers = [
        (
            chance.integers(1, 40, count) if prefill else np.ones(count, np.int64),
            chance.integers(Home.VRAM, Home.DISK + disk, count),
        )
        for _ in range(repeats)
    ]
    times, worst = [], 0.0
    for loads, homes in layers:
        begun = perf_counter()
        scheduler.schedule(loads, homes)
        times.append(1e6 * (perf_counter() - begun))
    for loads, homes in layers:
        static = scheduler.execute(all_on_cpu(homes), loads, homes)
        worst = max(worst, scheduler.schedule(loads, homes).makespan_s / static.makespan_s)
    report.gate(f"{count} experts, disk {disk}, prefill {prefill}", worst <= 1 + 1e-9, "no static mapping is better")
    return Spread.of(times)


def _policy(report: Report, name: str, geometry: Geometry, scale: DecisionScale, *, has_target: bool) -> None:
    warm, cold = (
        Spread.of(decisions_us(make_policy(name, geometry), geometry, scale.tokens, flush))
        for flush in (np.zeros(0), np.ones(scale.flush_nbytes // 8))
    )
    report.tables.setdefault("Cache policy, a layer", []).append(
        {"experts": geometry.counts[0], "policy": name, "us": warm, "us cold": cold}
    )
    if has_target:
        report.target(f"{name}, a layer of {geometry.counts[0]} experts, us", warm.median, "at most", POLICY_TARGET_US)


def decisions_us(
    policy: CachePolicy, geometry: Geometry, tokens: int, flush: npt.NDArray[np.float64], seed: int = 0
) -> list[float]:
    """Microseconds of each layer's decision while `tokens` tokens are decoded.

    Args:
        policy: of no experts yet.
        geometry: layers of equally many experts.
        tokens: that go through all layers.
        flush: what is read before each decision; of no elements for nothing.
        seed: of the routing.
    """
    chance = np.random.default_rng(seed)
    slots = geometry.total // 4
    policy.on_resize(slots)
    resident = set(chance.choice(geometry.total, slots, replace=False).tolist())
    for key in resident:
        policy.on_insert(key)
    times = []
    for step in range(tokens * geometry.layers):
        first, end = geometry.first_keys[step % geometry.layers : step % geometry.layers + 2].tolist()
        here = [key for key in range(first, end) if key in resident]
        gone = [key for key in range(first, end) if key not in resident]
        keys = sorted([*_some(chance, here, ACTIVE - MISSING), *_some(chance, gone, MISSING)])
        missing = [key for key in keys if key not in resident]
        flush.sum()
        begun = perf_counter()
        policy.on_route(keys)
        victims = policy.victims(set(keys), len(missing))
        for victim, key in zip(victims, missing, strict=True):
            policy.on_evict(victim)
            policy.on_insert(key)
        times.append(1e6 * (perf_counter() - begun))
        resident.difference_update(victims)
        resident.update(missing)
    return times


def _some(chance: np.random.Generator, keys: Sequence[int], count: int) -> list[int]:
    return chance.choice(keys, min(count, len(keys)), replace=False).tolist() if keys else []


class _Run:
    """A model that reads random tokens."""

    def __init__(self, policy: str, checkpoint: Path, work: Path, share: float, scale: DecisionScale) -> None:
        context = scale.turn_tokens * (scale.rounds + 1)
        ram = budget_for(checkpoint, share, context)
        self.model = offload.load(
            checkpoint, ram=ram, nvme=store_root(work), context=context, policy=policy, prefetch=False, progress=False
        )
        self.runtime = cast(Any, self.model.offload)
        self.logits = torch.empty(0)
        self._cache = DynamicCache(config=self.model.config)
        self._tokens = random_tokens(context, scale.shape.vocab, 0)

    def close(self) -> None:
        self.runtime.learners = {}
        self.runtime.close()

    @torch.no_grad()
    def decode(self, count: int) -> float:
        """Tokens a second of the next tokens."""
        at = int(self._cache.get_seq_length())
        begun = perf_counter()
        for token in self._tokens[at : at + count]:
            found = self.model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
            self.logits = found.logits[0, -1]
        return count / (perf_counter() - begun)


def _decode(report: Report, checkpoint: Path, work: Path, share: float, scale: DecisionScale) -> None:
    with ExitStack() as stack:
        runs = {}
        for policy in ("lru", DEFAULT_POLICY):
            runs[policy] = _Run(policy, checkpoint, work, share, scale)
            stack.callback(runs[policy].close)
        turns = {policy: partial(run.decode, scale.turn_tokens) for policy, run in runs.items()}
        interleave(turns, 1)
        speeds = interleave(turns, scale.rounds)
        gate_same_bits(report, f"logits, {share:.0%}", {name: run.logits.float().numpy() for name, run in runs.items()})
        for policy, run in runs.items():
            report.tables.setdefault("Decode where nothing can be foreseen", []).append(
                {
                    "cached": f"{share:.0%}",
                    "policy": policy,
                    "tokens/s": Spread.of(speeds[policy]),
                    "/ lru": ratios(speeds[policy], speeds["lru"]),
                    "hit rate": run.runtime.stats().hit_rate,
                }
            )
