"""A plan run against a trace: every layer of every pass, on simulated resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from placement.dense_cost import DenseCost, layer_cost, pass_cost
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.layer_kinds import layer_kinds
from placement.model_spec import ModelSpec
from placement.passes import Pass
from placement.plan import Plan
from placement.simulator.costs import ExpertCosts
from placement.simulator.layer import LayerWork, play, play_in_order
from placement.simulator.machine import Machine, Span
from placement.simulator.tiers import Found, SimulatedTiers
from prefetch.policies.base import CachePolicy
from prefetch.policies.lru import LruPolicy
from prefetch.scheduler.records import Home
from prefetch.traces.replay import keys_of
from prefetch.traces.trace import RoutingTrace, TraceError


@dataclass
class Phase:
    """Passes of one kind that counted.

    Attributes:
        passes: how many.
        tokens: of all of them.
        seconds: of all of them.
        experts: that layers needed, once for each layer and pass.
        in_vram: of those, found in VRAM.
        in_ram: of those, found in RAM.
        busy_s: seconds of work by resource.
    """

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    experts: int = 0
    in_vram: int = 0
    in_ram: int = 0
    busy_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("cpu", "gpu", "link", "disk"), 0.0))

    @property
    def tokens_per_s(self) -> float:
        """Speed; 0 where nothing counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Experts found in VRAM or RAM; 0 where none was needed."""
        return (self.in_vram + self.in_ram) / self.experts if self.experts else 0.0

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the time in which each resource works."""
        return {name: busy / self.seconds if self.seconds else 0.0 for name, busy in self.busy_s.items()}


@dataclass(frozen=True)
class Simulation:
    """What came of a simulation.

    Attributes:
        decode: passes of decode after the warm ones.
        prefill: all passes of prompts.
        events: experts that layers needed, in all passes.
        spans: what resources did in the recorded passes.
    """

    decode: Phase
    prefill: Phase
    events: int
    spans: list[Span]


def homes_of(plan: Plan) -> Homes:
    """Where a plan puts everything."""
    vram = plan.vram
    if vram is None:
        return Homes((), (), False, 0, plan.ram_slots, plan.read_chunk_nbytes, plan.reader_threads)
    return Homes(
        vram.dense_layers, vram.kv_layers, vram.head, vram.slots, plan.ram_slots, plan.read_chunk_nbytes,
        plan.reader_threads,
    )  # fmt: skip


def simulate(
    spec: ModelSpec,
    profile: HardwareProfile,
    homes: Homes,
    trace: RoutingTrace,
    *,
    policy: CachePolicy | None = None,
    batch: int = 1,
    warm: int | None = None,
    recorded: Sequence[int] = (),
) -> Simulation:
    """Run a trace.

    Layers come one after the other, as in the runtime: what is missing is read when its layer is routed, residents are
    computed meanwhile, and what arrives is computed as it comes. With an accelerator the runtime's scheduler says which
    experts are copied to it. Nothing is read ahead. Passes of the trace are passes of the model: a sequence's cache
    grows from one to the next, and begins anew with a prompt that follows decode.

    Args:
        spec: with layers.
        profile: the machine.
        homes: where everything lives.
        trace: of this model.
        policy: of RAM's slots, empty; None for least recently used.
        batch: sequences whose prompts go through the model together.
        warm: passes of decode that only fill slots; None for half of them.
        recorded: passes, by number, whose spans are kept.

    Raises:
        TraceError: the trace is another model's.
        ValueError: the spec has no layers, or the profile lacks a format, a disk or an accelerator.
    """
    if trace.geometry.counts != tuple(layer.count for layer in spec.experts):
        raise TraceError(f"the trace {trace.name!r} is not of {spec.name}: its layers have other numbers of experts")
    runner = _Runner(spec, profile, homes, LruPolicy() if policy is None else policy)
    decodes = int((~trace.pass_prefill).sum())
    runner.warm = decodes // 2 if warm is None else warm
    chosen = set(recorded)
    cached = 0
    for index in range(trace.passes):
        prefill = bool(trace.pass_prefill[index])
        tokens = int(trace.pass_tokens[index])
        if prefill and index and not trace.pass_prefill[index - 1]:
            cached = 0
        # A pass of decode has one token of each sequence.
        together = batch if prefill and tokens % batch == 0 else 1 if prefill else tokens
        work = Pass(together, tokens // together, float(cached))
        runner.run_pass(work, _steps(trace, index), prefill=prefill, record=index in chosen)
        cached += work.new_tokens
    return Simulation(runner.decode, runner.prefill, runner.events, runner.spans)


class _Step(NamedTuple):
    """What one MoE layer of a pass needs: expert keys, ascending, tokens of each, and what policies are told."""

    keys: list[int]
    loads: list[int]
    shares: list[float] | None


def _steps(trace: RoutingTrace, index: int) -> list[_Step]:
    """All MoE layers of a pass."""
    start, end = trace.pass_starts[index : index + 2]
    if end - start == 1 and not trace.pass_prefill[index]:
        chosen = np.sort(trace.experts[start].astype(np.int64), axis=1) + trace.geometry.first_keys[:-1, None]
        ones = [1] * trace.top_k
        return [_Step(keys, ones, None) for keys in chosen.tolist()]
    steps = (trace.step(index, layer) for layer in range(trace.geometry.layers))
    return [_Step(keys_of(trace, step), step.loads.tolist(), step.shares) for step in steps]


class _Runner:
    """The state of a simulation."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, homes: Homes, policy: CachePolicy) -> None:
        self.spec = spec
        self.profile = profile if homes.uses_vram else profile.without_gpu()
        self.homes = homes
        self.machine = Machine()
        self.tiers = SimulatedTiers(policy, homes.ram_slots, homes.vram_slots)
        self.tiers.preload(spec.expert_count)
        self.decode, self.prefill = Phase(), Phase()
        has_all = homes.vram_slots + homes.ram_slots >= spec.expert_count
        format = spec.experts[0].layout.format if spec.experts else None
        self._step_s = 0.0 if has_all else profile.cpu.overheads_in(format).step_s
        self.spans: list[Span] = []
        self.events = 0
        self.warm = 0
        self._decodes = 0
        self._dense_vram, self._kv_vram = set(homes.dense_in_vram), set(homes.kv_in_vram)
        self._names = [f"layer {index}" for index in range(len(spec.layers))]
        self._kind_of = {index: kind for kind in layer_kinds(spec) for index in kind.indices}
        self._costs = {
            kind.indices[0]: ExpertCosts(kind.experts, self.profile, homes)
            for kind in layer_kinds(spec)
            if kind.experts is not None
        }

    def run_pass(self, work: Pass, steps: Sequence[_Step], *, prefill: bool, record: bool) -> None:
        """All layers of one pass, and what comes before and after them."""
        phase = self.prefill if prefill else self.decode if self._decodes >= self.warm else Phase()
        self._decodes += not prefill
        machine = self.machine
        machine.spans = self.spans if record else None
        machine.count_from_zero()
        start = now = max(resource.free_s for resource in machine.resources())
        head_s, overhead_s = pass_cost(self.spec, self.profile, self.homes, work)
        now = machine.work(machine.cpu, now, overhead_s, "pass")
        dense: dict[tuple[int, bool, bool], DenseCost] = {}
        for index, layer in enumerate(self.spec.layers):
            kind = self._kind_of[index]
            key = kind.indices[0], index in self._dense_vram, index in self._kv_vram
            if key not in dense:
                dense[key] = layer_cost(
                    self.spec, kind.layer, self.profile, work, dense_vram=key[1], kv_vram=key[2]
                )  # fmt: skip
            now = self._dense(now, dense[key], self._names[index])
            if layer.experts is not None:
                now = self._experts(now, self._costs[kind.indices[0]], steps[layer.experts], work, phase, index)
        device = machine.gpu if self.homes.head_in_vram else machine.cpu
        now = machine.work(device, now, head_s, "output layer")
        phase.passes += 1
        phase.tokens += work.rows
        phase.seconds += now - start
        for resource in machine.resources():
            phase.busy_s[resource.name] += resource.busy_s
            # What idles at the end of a pass does not begin the next one before the others.
            resource.free_s = now

    def _dense(self, now: float, cost: DenseCost, name: str) -> float:
        machine = self.machine
        if cost.gpu_busy_s:
            now = machine.work(machine.gpu, now, cost.gpu_busy_s, name, "dense")
            now = machine.work(machine.link, now, cost.link_s, name, "activations")
        return machine.work(machine.cpu, now, cost.total_s - cost.gpu_busy_s - cost.link_s, name, "dense")

    def _experts(self, now: float, costs: ExpertCosts, step: _Step, work: Pass, phase: Phase, index: int) -> float:
        """One MoE layer."""
        keys = step.keys
        loads = dict(zip(keys, step.loads, strict=True))
        outputs = sum(step.loads) * self.spec.hidden_size
        ordered = costs.groups_of(outputs) > 1

        def choose(in_vram: list[int], in_ram: list[int], missing: list[int]) -> set[int]:
            if ordered:
                return set()
            every = [*in_vram, *in_ram, *missing]
            homes = [Home.VRAM] * len(in_vram) + [Home.RAM] * len(in_ram) + [Home.DISK] * len(missing)
            counts = [loads[key] for key in every]
            made = costs.scheduler(counts).schedule(counts, homes)
            return {every[place] for place in made.transfers.tolist()}

        found = self.tiers.step(keys, step.shares, choose)
        phase.experts += len(keys)
        phase.in_vram += len(found.in_vram)
        phase.in_ram += len(found.in_ram)
        self.events += len(keys)
        todo = self._work(
            costs, found, loads, work.rows, dense_vram=index in self._dense_vram, decode=work.new_tokens == 1
        )
        name = self._names[index]
        if work.new_tokens == 1 and self._step_s:
            now = self.machine.work(self.machine.cpu, now, self._step_s, name, "looks for experts")
        if not ordered:
            return play(self.machine, now, todo, name)
        arrival = dict(zip(sorted(found.missing), todo.reads, strict=True))
        above = set(found.in_vram)
        experts = [
            (arrival[key][0] if key in arrival else 0.0, costs.seconds(loads[key], on_gpu=key in above), key in above)
            for key in keys
        ]
        now = play_in_order(self.machine, now, experts, todo, name)
        return self.machine.work(self.machine.cpu, now, costs.grouping_s(outputs), name, "sums of groups")

    def _work(
        self, costs: ExpertCosts, found: Found, loads: dict[int, int], rows: int, *, dense_vram: bool, decode: bool
    ) -> LayerWork:
        """Seconds of what was found where. Those with many tokens are read last: others compute meanwhile."""
        copied = found.copied
        missing = found.missing
        if rows > 1:
            missing = sorted(missing, key=lambda key: -loads[key])
        work = LayerWork(cpu_call_s=costs.cpu_call_s, gpu_call_s=costs.gpu_call_s, copy_s=costs.copy_s)
        work.arrival_s = costs.step_arrival_s if decode else costs.arrival_s
        work.resident_cpu_s = [costs.seconds(loads[key]) for key in found.in_ram if key not in copied]
        if missing:
            arrivals = costs.reads.arrivals(len(missing))
            work.disk_s = arrivals[-1]
            work.reads = [
                (after, costs.seconds(loads[key], on_gpu=key in copied), key in copied)
                for after, key in zip(arrivals, missing, strict=True)
            ]
        if self.homes.uses_vram:
            work.in_vram_s = [costs.seconds(loads[key], on_gpu=True) for key in found.in_vram]
            work.copied_s = [costs.seconds(loads[key], on_gpu=True) for key in found.in_ram if key in copied]
            crossing = costs.crossing_s(rows)
            # Activations cross to whoever is not where the layer around is.
            work.crossing_s = 0.0 if dense_vram else crossing
            if dense_vram:
                work.cpu_call_s += crossing
                work.arrival_s += crossing
        return work
