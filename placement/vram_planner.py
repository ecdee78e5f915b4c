"""What an accelerator's memory holds, by sizes alone: for plans that are executed without a profile of the machine.

Dense weights are read by every token, an expert by some: so the dense weights of all layers come first, then expert
slots. Of a KV cache in blocks every token reads all: its newest blocks come before slots as well, where the layers that
write and attend to them are. Where dense weights do not fit, a window of WINDOW_LAYERS layers is kept, through which
those that have no place of their own stream in every pass (TPI-LLM, Li et al. 2024; Superpipeline, 2024). A streamed
layer crosses the link once in a pass however large the window is, so the window is as small as lets one layer come
while another computes, and what is left holds layers for good. Streamed layers are spread evenly: the link carries them
while others compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from placement.homes import Homes
from placement.kv import LEAST_BLOCKS, largest_block_nbytes, whole_above_nbytes, with_blocks_above
from placement.memory_use import STAGING_SLOTS, kv_moved_nbytes
from placement.model_spec import ModelSpec
from placement.plan import Plan, RamUse, Tier, VramPlan, VramUse
from placement.planner import PlanInfeasibleError

WINDOW_LAYERS = 2


def with_vram(
    spec: ModelSpec,
    plan: Plan,
    budget_nbytes: int,
    *,
    runs_attention: bool = False,
    alignment_nbytes: int = 0,
    other_nbytes: int = 0,
    kv_vram_nbytes: int | None = 0,
) -> Plan:
    """`plan` with an accelerator's memory put to use, without a prediction.

    Args:
        spec: of the plan's model.
        plan: for RAM alone.
        budget_nbytes: bytes of that memory.
        runs_attention: the accelerator computes all but the experts that are below: every dense weight has to be
            there or stream through, and a KV cache that is not in blocks has to be there. Otherwise, where not even the
            window fits, dense weights stay in RAM, and of a dense model there is then nothing to put there.
        alignment_nbytes: what dense weights take beside their bytes.
        other_nbytes: what has to be there besides: activations, workspaces.
        kv_vram_nbytes: for the newest blocks of a KV cache in blocks; None for all that there is room for.

    Raises:
        PlanInfeasibleError: the budget does not hold an expert, or not what has to be there.
    """
    beside = _Beside(runs_attention, alignment_nbytes, other_nbytes)
    if kv_vram_nbytes != 0 and plan.kv is not None:
        return _with_blocks(spec, plan, budget_nbytes, beside, kv_vram_nbytes)
    return _around(spec, plan, budget_nbytes, beside, 0)


class _Beside(NamedTuple):
    """See `with_vram`."""

    runs_attention: bool
    alignment_nbytes: int
    other_nbytes: int


def _around(spec: ModelSpec, plan: Plan, budget_nbytes: int, beside: _Beside, blocks_nbytes: int) -> Plan:
    """As `with_vram`, with so many bytes of a KV cache's blocks, which count as activations."""
    runs_attention, alignment_nbytes, other_nbytes = beside
    least = _least_slots_nbytes(plan)
    indices = range(len(spec.layers))
    everywhere = Homes(tuple(indices), tuple(indices), True, 0, 0, 1, 1)
    kv = kv_moved_nbytes(spec, plan.workload, everywhere) if runs_attention and plan.kv is None else 0
    sizes = [layer.dense_nbytes for layer in spec.layers]
    rest = spec.dense_nbytes - sum(sizes) + alignment_nbytes
    other = other_nbytes + blocks_nbytes
    fixed = rest + kv + other
    if sizes and budget_nbytes >= fixed + sum(sizes) + least:
        return _planned(plan, budget_nbytes, tuple(indices), 0, rest + sum(sizes), kv, other)
    window = WINDOW_LAYERS * max(sizes, default=0)
    room = budget_nbytes - fixed - window - least
    if len(sizes) > WINDOW_LAYERS and room >= 0:
        resident = _resident(sizes, room)
        dense = rest + window + sum(sizes[index] for index in resident)
        return _planned(plan, budget_nbytes, resident, WINDOW_LAYERS, dense, kv, other)
    if runs_attention or not plan.expert_count:
        needed = fixed + min(window, sum(sizes)) + least
        slots = f", expert slots {least:,}" if least else ""
        raise PlanInfeasibleError(
            f"{plan.model} needs at least {needed:,} bytes of VRAM: {rest:,} for what is in no layer, KV cache "
            f"{kv + blocks_nbytes:,}, activations and workspaces {other_nbytes:,}, a window of dense layers "
            f"{min(window, sum(sizes)):,}{slots}; there are {budget_nbytes:,}",
            0,
        )
    return _planned(plan, budget_nbytes, (), 0, 0, 0, blocks_nbytes)


def _with_blocks(spec: ModelSpec, plan: Plan, budget_nbytes: int, beside: _Beside, wanted: int | None) -> Plan:
    """As `with_vram`, with the newest blocks of the KV cache in what dense weights leave of the budget."""
    assert plan.kv is not None
    whole, block = whole_above_nbytes(spec, plan.workload, plan.kv.format), largest_block_nbytes(spec, plan.kv.format)
    if wanted is None:
        made = _around(spec, plan, budget_nbytes, beside, 0)
        assert made.vram is not None
        # Without the layers above, all that is new would have to go up before it is attended there.
        dense = made.vram.use.dense_nbytes
        room = budget_nbytes - dense - made.vram.use.activation_nbytes - _least_slots_nbytes(plan) if dense else 0
        nbytes = min(room, whole) // block * block
        if nbytes < LEAST_BLOCKS * block:
            return made
    else:
        nbytes = min(wanted, whole) // block * block
        least = _least_slots_nbytes(plan)
        if nbytes + least > budget_nbytes:
            raise PlanInfeasibleError(
                f"kv_vram={wanted} leaves no room in vram={budget_nbytes} for the {least:,} bytes of expert slots that "
                f"{plan.model} needs there",
                0,
            )
    made = _around(spec, plan, budget_nbytes, beside, nbytes)
    assert made.vram is not None
    use, kv = made.vram.use, with_blocks_above(spec, plan.workload, plan.kv, nbytes)
    use = replace(use, kv_nbytes=nbytes, activation_nbytes=use.activation_nbytes - nbytes)
    ram, freed = made.ram, plan.kv.ram_nbytes - kv.ram_nbytes
    slots = min(plan.expert_count, made.ram_slots + freed // plan.slot_nbytes)
    ram = RamUse(ram.dense_nbytes, ram.kv_nbytes - freed, ram.activation_nbytes, slots * plan.slot_nbytes)
    return replace(made, kv=kv, ram=ram, ram_slots=slots, vram=replace(made.vram, use=use))


def _least_slots_nbytes(plan: Plan) -> int:
    return min(STAGING_SLOTS, plan.expert_count) * plan.slot_nbytes


def _resident(sizes: list[int], room: int) -> tuple[int, ...]:
    """Which layers to keep: as many as fit, the others spread evenly."""
    for streamed in range(WINDOW_LAYERS + 1, len(sizes) + 1):
        gone = {index * len(sizes) // streamed for index in range(streamed)}
        kept = tuple(index for index in range(len(sizes)) if index not in gone)
        if sum(sizes[index] for index in kept) <= room:
            return kept
    return ()


def _planned(
    plan: Plan, budget: int, dense_layers: tuple[int, ...], window: int, dense: int, kv: int, other: int
) -> Plan:
    slots = min(plan.expert_count, (budget - dense - kv - other) // plan.slot_nbytes)
    if slots < min(1, plan.expert_count):
        raise PlanInfeasibleError(
            f"vram={budget} does not hold one expert of {plan.model}: give vram={plan.slot_nbytes} or more", 0
        )
    use = VramUse(dense, kv, other, slots * plan.slot_nbytes)
    vram = VramPlan(dense_layers, dense_layers if kv else (), dense > 0, slots, use, budget, window)
    # What left RAM makes room for experts.
    dense_left = 0 if window or not dense else plan.ram.dense_nbytes
    kv_left = plan.ram.kv_nbytes if kv else 0
    ram_slots = min(plan.expert_count, plan.ram_slots + (dense_left + kv_left) // plan.slot_nbytes)
    ram = replace(
        plan.ram, dense_nbytes=plan.ram.dense_nbytes - dense_left, kv_nbytes=plan.ram.kv_nbytes - kv_left,
        slot_nbytes=ram_slots * plan.slot_nbytes,
    )  # fmt: skip
    dense_tier: Tier = "vram" if dense_left else plan.dense_tier
    kv_tier: Tier = "vram" if kv else plan.kv_tier
    return replace(
        plan, dense_tier=dense_tier, kv_tier=kv_tier, ram_slots=ram_slots, ram=ram, vram=vram, prediction=None
    )
