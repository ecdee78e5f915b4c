"""Plans of what `offload.load` puts on an accelerator, by sizes, and how fast that would be."""

from __future__ import annotations

from dataclasses import replace

from placement.hardware_profile import HardwareProfile
from placement.kv import KvChoice
from placement.kv_settings import PIECES_NBYTES
from placement.memory_use import vram_beside_weights
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan, with_prediction
from placement.predict import Routing
from placement.vram_planner import with_vram
from placement.workload import Workload


def make_loaded_plan(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    ram_budget_nbytes: int,
    vram_budget_nbytes: int,
    routing: Routing | None,
    kv: KvChoice,
) -> Plan:
    """The plan with its prediction; without what padding takes, which needs the model itself.

    Where the KV cache does not fit beside the window of dense layers, it lies in blocks, as in the runtime.

    Args:
        spec: with layers.
        profile: the machine, with an accelerator.
        workload: what will run.
        ram_budget_nbytes: bound on all that the runtime holds in host memory.
        vram_budget_nbytes: bound on all that it holds in VRAM.
        routing: what is known of the experts' popularity.
        kv: what the user wants of the KV cache; `vram_nbytes` is of its newest blocks, None for as many as fit.

    Raises:
        PlanInfeasibleError: the budgets are too small.
        ValueError: `profile` cannot predict this spec.
    """

    def placed(choice: KvChoice) -> Plan:
        base = make_plan(spec, workload, ram_budget_nbytes, kv=choice)
        other = vram_beside_weights(spec, workload) + (0 if base.kv is None else PIECES_NBYTES)
        above = with_vram(
            spec, base, vram_budget_nbytes, runs_attention=True, other_nbytes=other, kv_vram_nbytes=choice.vram_nbytes
        )  # fmt: skip
        return with_prediction(spec, above, profile, routing)

    try:
        return placed(kv)
    except PlanInfeasibleError:
        if kv.blocks:
            raise
        return placed(replace(kv, blocks=True))
