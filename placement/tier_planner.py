"""Plans over VRAM, RAM and disk: the fastest for a workload that the budgets allow.

Every choice of dense parts in VRAM (`dense_choices`) is combined with numbers of expert slots in VRAM; RAM takes as
many slots as fit. What is tried depends on the model only, so a larger budget tries all that a smaller one did and
more: it is never predicted slower. Numbers of slots are all tried up to VRAM_STEPS experts and in that many equal steps
beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from placement.dense_choices import DenseChoice, Saving, dense_choices
from placement.dense_cost import attention_s, layer_cost, linears_s, pass_cost
from placement.expert_cost import IntArray, expert_cost, longer_after_reads
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.kv import (
    LEAST_BLOCKS,
    KvChoice,
    KvPlan,
    landmarks_nbytes,
    largest_block_nbytes,
    layout_format,
    minimum_nbytes,
    whole_above_nbytes,
    with_blocks_above,
)
from placement.kv_cost import blocks_in_vram, in_blocks, with_blocks_in_vram, with_reads, with_sparsity
from placement.kv_settings import PIECES_NBYTES
from placement.layer_kinds import layer_kinds
from placement.loaded_planner import make_loaded_plan
from placement.memory_use import ram_use, vram_use
from placement.model_spec import ModelSpec
from placement.passes import Pass, decode_pass, prefill_passes
from placement.plan import Plan, RamUse, VramPlan
from placement.planner import (
    MINIMUM_SLOTS,
    PlanInfeasibleError,
    blocks_within,
    make_plan,
    nothing_in_vram,
)
from placement.predict import Routing, predict
from placement.routing import FloatArray, HitCurve
from placement.workload import Workload

VRAM_STEPS = 256
RATE_POINTS = 2048


@dataclass(frozen=True)
class _Phase:
    """Passes of one kind, with hit rates for every number of slots from 0 to all experts."""

    work: Pass
    weight: float
    rates: FloatArray


def make_tiered_plan(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    ram_budget_nbytes: int,
    vram_budget_nbytes: int,
    routing: Routing | None = None,
    kv: KvChoice | None = None,
) -> Plan:
    """The plan with the least expected seconds for a prompt and its new tokens; of a dense model that of
    `make_loaded_plan` or, where its window does not fit, that for the CPU alone.

    Args:
        spec: with layers.
        profile: the machine.
        workload: what will run.
        ram_budget_nbytes: bound on all that the runtime holds in host memory.
        vram_budget_nbytes: bound on all that it holds in VRAM; 0, or a machine without an accelerator, gives what
            `make_plan` does.
        routing: what is known of the experts' popularity.
        kv: what the user wants of the KV cache. None or no wish: in one piece, in VRAM and RAM, where that fits. Else,
            as in the runtime, in blocks in RAM and on disk, to which the CPU attends, and of `kv.vram_nbytes` (without
            `kv`: None) in VRAM: where the dense weights of all layers are, before experts.

    Raises:
        PlanInfeasibleError: the budgets are too small; with the RAM that would do beside this VRAM.
        ValueError: `profile` cannot predict this spec.
    """
    routing = Routing() if routing is None else routing
    if profile.gpu is None or vram_budget_nbytes <= 0:
        below = None if kv is None else replace(kv, vram_nbytes=0)
        return make_plan(spec, workload, ram_budget_nbytes, profile, routing, below)
    request = _Request(spec, profile, workload, routing, ram_budget_nbytes, vram_budget_nbytes)
    choice = KvChoice(vram_nbytes=None) if kv is None else kv
    if choice.sparsity is not None:
        choice = replace(choice, vram_nbytes=0)
    if not spec.experts:
        # There is nothing to choose between: dense weights take the VRAM as far as it goes, the others stream through.
        try:
            return make_loaded_plan(
                spec, profile, workload, ram_budget_nbytes, vram_budget_nbytes, routing, choice
            )  # fmt: skip
        except PlanInfeasibleError:
            below = replace(choice, vram_nbytes=0)
            return make_plan(spec, workload, ram_budget_nbytes, profile, routing, below)
    pageable = any(shape is not None for shape in spec.kv_shapes)
    if pageable and choice not in (KvChoice(), KvChoice(vram_nbytes=None)):
        return _fastest_within(replace(request, kv=choice))
    try:
        return _fastest_within(request)
    except PlanInfeasibleError:
        if not pageable:
            raise
        try:
            return _fastest_within(replace(request, kv=replace(choice, blocks=True)))
        except PlanInfeasibleError:
            pass
        raise


@dataclass(frozen=True)
class _Request:
    """What a plan is asked for; `kv` of a cache in blocks, None for one in one piece; `blocks_nbytes` are in VRAM."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    routing: Routing
    ram_nbytes: int
    vram_nbytes: int
    kv: KvChoice | None = None
    blocks_nbytes: int = 0

    def above(self, homes: Homes) -> tuple[int, ...]:
        """Bytes of VRAM to try for blocks: what was asked for, else as many as there is room for, and none."""
        if self.kv is None or self.kv.vram_nbytes == 0:
            return (0,)
        if len(homes.dense_in_vram) < len(self.spec.layers):
            # What is new would have to go up before it is attended to there.
            return (0,) if self.kv.vram_nbytes is None else ()
        format = layout_format(self.kv.format, self.spec.dtype)
        block = largest_block_nbytes(self.spec, format)
        whole = whole_above_nbytes(self.spec, self.workload, format)
        if self.kv.vram_nbytes is not None:
            return (min(self.kv.vram_nbytes, whole) // block * block,)
        room = self.vram_nbytes - self.pieces_nbytes - vram_use(self.spec, self.workload, homes).total_nbytes
        fitting = min(room, whole) // block * block
        return (0, fitting) if fitting >= LEAST_BLOCKS * block else (0,)

    @property
    def least_slots_nbytes(self) -> int:
        return min(MINIMUM_SLOTS, self.spec.expert_count) * self.spec.bundle_nbytes

    @property
    def pieces_nbytes(self) -> int:
        """Of VRAM, for chunks of prompts that attend to blocks."""
        return 0 if self.kv is None else PIECES_NBYTES

    def cache(self, homes: Homes) -> KvPlan | None:
        """The cache in blocks that there is room for."""
        if self.kv is None:
            return None
        room = self.ram_nbytes - self._ram(homes, self._known_nbytes).total_nbytes - self.least_slots_nbytes
        below = blocks_within(self.spec, self.workload, self.kv, room)
        if not self.blocks_nbytes:
            return below
        return with_blocks_above(self.spec, self.workload, below, self.blocks_nbytes)

    def ram(self, homes: Homes, cache: KvPlan | None) -> RamUse:
        """Host memory with that cache."""
        return self._ram(homes, None if cache is None else self._known_nbytes + cache.ram_nbytes)

    def needed_nbytes(self, homes: Homes, cache: KvPlan | None) -> int:
        """The least host memory, with the fewest slots and blocks."""
        if self.kv is None or cache is None:
            return self._ram(homes, None).total_nbytes + self.least_slots_nbytes
        least = minimum_nbytes(self.spec, self.workload.batch, cache.format, above=self.kv.vram_nbytes != 0)
        paged = self._known_nbytes + min(least, cache.ram_nbytes)
        return self._ram(homes, paged).total_nbytes + self.least_slots_nbytes

    def saved_s(self, cache: KvPlan | None) -> float:
        """Seconds of the whole workload that blocks in VRAM save."""
        if cache is None or not cache.vram_tokens:
            return 0.0
        return self.workload.new_tokens * blocks_in_vram(self.spec, self.profile, self.workload, cache).saved

    @property
    def _known_nbytes(self) -> int:
        sparsity = None if self.kv is None else self.kv.sparsity
        return landmarks_nbytes(self.spec, self.workload.batch, self.workload.context_tokens, sparsity)

    def _ram(self, homes: Homes, paged_nbytes: int | None) -> RamUse:
        return ram_use(self.spec, self.workload, replace(homes, ram_slots=0), paged_nbytes)


def _fastest_within(asked: _Request) -> Plan:
    """See `make_tiered_plan`."""
    spec, vram_nbytes = asked.spec, asked.vram_nbytes - asked.pieces_nbytes
    nothing = nothing_in_vram(spec)
    search = _Search(in_blocks(spec, asked.cache(nothing)), asked.profile, asked.workload, asked.routing)
    best: tuple[float, Homes, _Request] | None = None
    least = None
    for choice in search.choices:
        if asked.kv is not None and any(choice.kv):
            continue
        fixed = search.homes(choice)
        for blocks_nbytes in asked.above(fixed):
            tried, rest_nbytes = replace(asked, blocks_nbytes=blocks_nbytes), vram_nbytes - blocks_nbytes
            if vram_use(spec, asked.workload, fixed).total_nbytes > rest_nbytes:
                continue
            cache = tried.cache(fixed)
            needed = tried.needed_nbytes(fixed, cache)
            least = needed if least is None else min(least, needed)
            if needed > asked.ram_nbytes:
                continue
            used = tried.ram(fixed, cache).total_nbytes
            ram_slots = min(spec.expert_count, (asked.ram_nbytes - used) // spec.bundle_nbytes)
            saved_s = tried.saved_s(cache)
            for seconds, homes in search.best_slots(choice, fixed, ram_slots, rest_nbytes):
                if best is None or seconds - saved_s < best[0]:
                    best = seconds - saved_s, homes, tried
    if best is None and least is None and asked.kv is not None and asked.kv.vram_nbytes:
        raise PlanInfeasibleError(
            f"kv_vram={asked.kv.vram_nbytes} leaves no room in {asked.vram_nbytes:,} bytes of VRAM for the dense "
            f"layers of {spec.name}, without which no blocks lie there",
            0,
        )
    if best is None:
        minimum = asked.needed_nbytes(nothing, asked.cache(nothing)) if least is None else least
        raise PlanInfeasibleError(
            f"{spec.name} needs at least {minimum:,} bytes of RAM beside {asked.vram_nbytes:,} bytes of VRAM; "
            f"the budget is {asked.ram_nbytes:,}",
            minimum,
        )
    return _plan(best[2], best[1])


class _Search:
    """What all choices share: the phases of the workload and the costs of parts."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, workload: Workload, routing: Routing) -> None:
        self.spec, self.profile, self.workload, self.routing = spec, profile, workload, routing
        self.nothing = nothing_in_vram(spec)
        self.kinds = layer_kinds(spec)
        works = [(decode_pass(workload), float(workload.new_tokens))]
        works += [(work, float(work.count)) for work in prefill_passes(workload)]
        self.phases = [
            _Phase(work, weight, _all_rates(routing.hits(spec, work), spec.expert_count)) for work, weight in works
        ]
        self._dense: dict[tuple[int, bool, bool], float] = {}
        step = -(-spec.expert_count // VRAM_STEPS)
        self._vram_slots = np.arange(0, spec.expert_count + step, step).clip(max=spec.expert_count)
        self.choices = dense_choices(spec, self._savings())

    def homes(self, choice: DenseChoice, vram_slots: int = 0, ram_slots: int = 0) -> Homes:
        """The homes of a choice with these slots."""
        dense, kv = choice.layers(self.kinds)
        return replace(
            self.nothing,
            dense_in_vram=dense,
            kv_in_vram=kv,
            head_in_vram=choice.head,
            vram_slots=vram_slots,
            ram_slots=ram_slots,
        )

    def best_slots(
        self, choice: DenseChoice, fixed: Homes, ram_slots: int, vram_budget_nbytes: int
    ) -> Iterator[tuple[float, Homes]]:
        """(seconds, homes) of the best number of slots in VRAM, and of none."""
        spec = self.spec
        one = vram_use(spec, self.workload, replace(fixed, vram_slots=1))
        most = (vram_budget_nbytes - one.total_nbytes) // spec.bundle_nbytes + 1
        slots = self._vram_slots[self._vram_slots <= max(0, most)]
        if not fixed.uses_vram:
            # Without a slot nothing is on the accelerator, and nothing is copied there.
            slots = slots[1:]
            alone = self._seconds(choice, np.zeros(1, np.int64), ram_slots, self.profile.without_gpu())
            yield float(alone[0]), self.homes(choice, 0, min(ram_slots, spec.expert_count))
        if len(slots):
            seconds = self._seconds(choice, slots, ram_slots, self.profile)
            index = int(np.argmin(seconds))
            # Beside those in VRAM the others need no more slots than there are, but for those that reads pass through.
            rest = max(spec.expert_count - int(slots[index]), min(MINIMUM_SLOTS, spec.expert_count))
            yield float(seconds[index]), self.homes(choice, int(slots[index]), min(ram_slots, rest))

    def _seconds(self, choice: DenseChoice, slots: IntArray, ram_slots: int, profile: HardwareProfile) -> FloatArray:
        total = np.zeros(len(slots))
        both = np.minimum(slots + ram_slots, self.spec.expert_count)
        for number, phase in enumerate(self.phases):
            head_s, overhead_s = pass_cost(self.spec, profile, self.homes(choice), phase.work)
            total += phase.weight * (head_s + overhead_s)
            in_vram = phase.rates[slots]
            in_ram = np.maximum(phase.rates[both] - in_vram, 0.0)
            for kind, (dense, kv) in enumerate(zip(choice.dense, choice.kv, strict=True)):
                places = self._places(kind, dense, kv)
                for (vram, cached), times in places.items():
                    total += phase.weight * times * self._layer_s(number, kind, vram, cached)
                total += phase.weight * self._experts_s(phase, kind, places, in_vram, in_ram, profile)
        return total

    def _places(self, kind: int, dense: int, kv: int) -> dict[tuple[bool, bool], int]:
        """Layers of a kind by where their (dense weights, KV cache) are."""
        count = len(self.kinds[kind].indices)
        found = {(True, True): kv, (True, False): dense - kv, (False, False): count - dense}
        return {place: times for place, times in found.items() if times}

    def _experts_s(
        self, phase: _Phase, kind: int, places: dict[tuple[bool, bool], int], in_vram: FloatArray, in_ram: FloatArray,
        profile: HardwareProfile,
    ) -> FloatArray:  # fmt: skip
        """Routed experts of all layers of a kind, and what the layers around take longer for their reads."""
        layer, experts = self.kinds[kind].layer, self.kinds[kind].experts
        total = np.zeros(len(in_vram))
        if experts is None:
            return total
        need = self.routing.demand(experts, phase.work)
        linear_s = linears_s(layer.linears, profile.cpu, phase.work.rows)
        attending_s = attention_s(layer, profile.cpu, phase.work)
        decode = phase.work.new_tokens == 1
        longer = longer_after_reads(profile, need, in_vram + in_ram) if decode else total
        for (on_gpu, cached), times in places.items():
            around_s = (0.0 if on_gpu else linear_s) + (0.0 if cached else attending_s)
            cost = expert_cost(
                experts, profile, self.nothing, need, phase.work.rows, in_vram, in_ram, on_gpu=on_gpu, decode=decode
            )
            total = total + times * (cost.total_s + around_s * longer)
        return total

    def _layer_s(self, phase: int, kind: int, vram: bool, kv: bool) -> float:
        key = (phase * len(self.kinds) + kind, vram, kv)
        if key not in self._dense:
            layer, work = self.kinds[kind].layer, self.phases[phase].work
            cost = layer_cost(self.spec, layer, self.profile, work, dense_vram=vram, kv_vram=kv)
            self._dense[key] = cost.total_s
        return self._dense[key]

    def _savings(self) -> list[Saving]:
        """What each part saves over the whole workload, experts left where they are."""
        savings = []
        for kind in range(len(self.kinds)):
            layer = self.kinds[kind].layer
            for kv in (False, True):
                seconds = sum(
                    phase.weight * (self._layer_s(number, kind, False, False) - self._layer_s(number, kind, True, kv))
                    for number, phase in enumerate(self.phases)
                )
                tokens = self.workload.batch * self.workload.context_tokens
                nbytes = layer.dense_nbytes + (tokens * layer.kv_nbytes_per_token if kv else 0)
                savings.append(Saving(kind, kv, seconds, nbytes))
        if self.spec.head is not None:
            seconds = sum(
                phase.weight * (self._head_s(phase, False) - self._head_s(phase, True)) for phase in self.phases
            )
            savings.append(Saving(None, False, seconds, self.spec.head.nbytes))
        return savings

    def _head_s(self, phase: _Phase, vram: bool) -> float:
        return pass_cost(self.spec, self.profile, replace(self.nothing, head_in_vram=vram), phase.work)[0]


def _all_rates(curve: HitCurve, experts: int) -> FloatArray:
    """Hit rates of 0 to `experts` slots; of many, straight between RATE_POINTS of them."""
    slots: FloatArray = np.arange(experts + 1).astype(np.float64)
    if experts < RATE_POINTS:
        return curve.rate(slots)
    points: FloatArray = np.linspace(0.0, experts, RATE_POINTS).round()
    return np.interp(slots, points, curve.rate(points))


def _plan(asked: _Request, homes: Homes) -> Plan:
    """The record of homes."""
    spec, workload = asked.spec, asked.workload
    cache = asked.cache(homes)
    slots_nbytes = homes.ram_slots * spec.bundle_nbytes
    ram = replace(asked.ram(homes, cache), slot_nbytes=slots_nbytes)
    # All that does not depend on where things are is as in a plan without an accelerator and without bounds.
    base = make_plan(spec, workload, 1 << 62)
    on_gpu = None
    if homes.uses_vram:
        vram = vram_use(spec, workload, homes)
        activations = vram.activation_nbytes + asked.pieces_nbytes
        vram = replace(vram, activation_nbytes=activations, kv_nbytes=vram.kv_nbytes + asked.blocks_nbytes)
        on_gpu = VramPlan(
            homes.dense_in_vram, homes.kv_in_vram, homes.head_in_vram, homes.vram_slots, vram, asked.vram_nbytes
        )
    found = predict(in_blocks(spec, cache), asked.profile, homes, workload, asked.routing)
    found = with_blocks_in_vram(found, spec, asked.profile, workload, cache)
    found = with_reads(with_sparsity(found, spec, workload, cache), spec, asked.profile, workload, cache)
    return replace(
        base,
        dense_tier="vram" if len(homes.dense_in_vram) == len(spec.layers) else "ram",
        kv_tier="vram" if len(homes.kv_in_vram) == len(spec.layers) else "ram",
        ram_slots=homes.ram_slots,
        ram=ram,
        ram_budget_nbytes=asked.ram_nbytes,
        minimum_ram_nbytes=asked.needed_nbytes(homes, cache),
        vram=on_gpu,
        prediction=found,
        kv=cache,
    )
