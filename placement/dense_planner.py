"""Plans of dense models for machines with an accelerator: what `offload.load` does there, and how fast that would be.

Without experts there is nothing to choose between: dense weights take the accelerator's memory as far as it goes, and
the others stream through a window (`vram_planner`).
"""

from __future__ import annotations

from dataclasses import replace

from placement.hardware_profile import HardwareProfile
from placement.kv import KvChoice
from placement.kv_settings import PIECES_NBYTES
from placement.memory_use import vram_beside_weights
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan, with_prediction
from placement.vram_planner import with_vram
from placement.workload import Workload


def make_dense_plan(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    ram_budget_nbytes: int,
    vram_budget_nbytes: int,
    kv: KvChoice,
) -> Plan:
    """The plan of a dense model, with its prediction.

    Where the KV cache does not fit beside the window, it lies in blocks, as in the runtime. Where the window does not
    fit either, it is the plan for the CPU alone.

    Args:
        spec: with layers, without experts.
        profile: the machine, with an accelerator.
        workload: what will run.
        ram_budget_nbytes: bound on all that the runtime holds in host memory.
        vram_budget_nbytes: bound on all that it holds in VRAM.
        kv: what the user wants of the KV cache; `vram_nbytes` is of its newest blocks, None for as many as fit.

    Raises:
        PlanInfeasibleError: the RAM is too small for the dense weights.
        ValueError: `profile` cannot predict this spec.
    """
    for choice in dict.fromkeys((kv, replace(kv, blocks=True))):
        base = make_plan(spec, workload, ram_budget_nbytes, kv=choice)
        other = vram_beside_weights(spec, workload) + (0 if base.kv is None else PIECES_NBYTES)
        try:
            made = with_vram(
                spec, base, vram_budget_nbytes, runs_attention=True, other_nbytes=other,
                kv_vram_nbytes=choice.vram_nbytes,
            )  # fmt: skip
        except PlanInfeasibleError:
            continue
        return with_prediction(spec, made, profile)
    return make_plan(spec, workload, ram_budget_nbytes, profile, kv=replace(kv, vram_nbytes=0))
