"""What an accelerator's memory holds, by sizes alone: for plans that are executed without a profile of the machine.

Dense weights are read by every token, an expert by some: so the dense weights of all layers come first, then expert
slots. Where they do not fit, a window of WINDOW_LAYERS layers is kept, through which those that have no place of their
own stream in every pass (TPI-LLM, Li et al. 2024; Superpipeline, 2024). A streamed layer crosses the link once in a
pass however large the window is, so the window is as small as lets one layer come while another computes, and what
is left holds layers for good. Streamed layers are spread evenly: the link carries them while others compute.
"""

from __future__ import annotations

from dataclasses import replace

from placement.homes import Homes
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
) -> Plan:
    """`plan` with an accelerator's memory put to use, without a prediction.

    Args:
        spec: of the plan's model.
        plan: for RAM alone.
        budget_nbytes: bytes of that memory.
        runs_attention: the accelerator computes all but the experts that are below: the KV cache has to be there, and
            every dense weight has to be there or stream through. Otherwise, where not even the window fits, dense
            weights stay in RAM.
        alignment_nbytes: what dense weights take beside their bytes.
        other_nbytes: what has to be there besides: activations, workspaces.

    Raises:
        PlanInfeasibleError: the budget does not hold an expert, or not what has to be there.
    """
    least = min(STAGING_SLOTS, plan.expert_count) * plan.slot_nbytes
    indices = range(len(spec.layers))
    everywhere = Homes(tuple(indices), tuple(indices), True, 0, 0, 1, 1)
    kv = kv_moved_nbytes(spec, plan.workload, everywhere) if runs_attention else 0
    sizes = [layer.dense_nbytes for layer in spec.layers]
    rest = spec.dense_nbytes - sum(sizes) + alignment_nbytes
    fixed = rest + kv + other_nbytes
    if sizes and budget_nbytes >= fixed + sum(sizes) + least:
        return _planned(plan, budget_nbytes, tuple(indices), 0, rest + sum(sizes), kv, other_nbytes)
    window = WINDOW_LAYERS * max(sizes, default=0)
    room = budget_nbytes - fixed - window - least
    if len(sizes) > WINDOW_LAYERS and room >= 0:
        resident = _resident(sizes, room)
        dense = rest + window + sum(sizes[index] for index in resident)
        return _planned(plan, budget_nbytes, resident, WINDOW_LAYERS, dense, kv, other_nbytes)
    if runs_attention:
        needed = fixed + min(window, sum(sizes)) + least
        raise PlanInfeasibleError(
            f"{plan.model} needs at least {needed:,} bytes of VRAM: {rest:,} for what is in no layer, KV cache {kv:,}, "
            f"activations and workspaces {other_nbytes:,}, a window of dense layers {min(window, sum(sizes)):,}, "
            f"expert slots {least:,}; there are {budget_nbytes:,}",
            0,
        )
    return _planned(plan, budget_nbytes, (), 0, 0, 0, 0)


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
    if slots < 1:
        raise PlanInfeasibleError(
            f"vram={budget} does not hold one expert of {plan.model}: give vram={plan.slot_nbytes} or more", 0
        )
    use = VramUse(dense, kv, other, slots * plan.slot_nbytes)
    vram = VramPlan(dense_layers, dense_layers if kv else (), dense > 0, slots, use, budget, window)
    if window or not dense:
        return replace(plan, vram=vram, prediction=None)
    # What left RAM makes room for experts.
    ram_slots = min(plan.expert_count, plan.ram_slots + plan.ram.dense_nbytes // plan.slot_nbytes)
    ram = RamUse(0, plan.ram.kv_nbytes, plan.ram.activation_nbytes, ram_slots * plan.slot_nbytes)
    kv_tier: Tier = "vram" if kv else "ram"
    return replace(plan, dense_tier="vram", kv_tier=kv_tier, ram_slots=ram_slots, ram=ram, vram=vram, prediction=None)
