"""From a prepared model to a running one: store, dense weights, tiers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from offload.devices.host import HostDevice
from offload.hf.adopt import adopt
from offload.hf.dtypes import DTYPE_OF_FORMAT
from offload.hf.fused import fuse
from offload.moe.gate import recognise_gate
from offload.moe.layer import ExpertsLayer
from offload.preparation import Prepared
from offload.request import FUSED_KINDS
from offload.runtime import Runtime
from offload.store.convert import convert
from offload.store.progress import Progress
from prefetch.policies.lru import LruPolicy


def assemble(
    prepared: Prepared, store_root: Path, progress: Progress, fused: Iterable[str] = FUSED_KINDS
) -> PreTrainedModel:
    """Convert unless the store is there, load dense weights, start the runtime.

    When every expert has a slot, all are read now; otherwise slots fill as experts are needed.

    Args:
        prepared: the model.
        store_root: directory of stores.
        progress: told of what takes time.
        fused: kinds of modules that kernels compute.
    """
    store = convert(prepared.bundles, store_root, progress=progress)
    model = prepared.finish(progress)
    device = HostDevice()
    runtime = Runtime(prepared.plan, prepared.spec, store, _layers(model, prepared), device, LruPolicy())
    try:
        adopt(model, runtime)
        runtime.fused = fuse(model, fused)
        if prepared.plan.ram_slots == prepared.plan.expert_count:
            runtime.preload(progress)
    except BaseException:
        runtime.close()
        raise
    return model


def _layers(model: PreTrainedModel, prepared: Prepared) -> list[ExpertsLayer]:
    layers = []
    first_key = 0
    for experts in prepared.spec.experts:
        module = model.get_submodule(experts.module)
        layout = experts.layout
        dtype = DTYPE_OF_FORMAT[prepared.spec.dtype if layout.is_packed else layout.format]
        activation = recognise_gate(module, has_gate=layout.has_gate)
        layers.append(ExpertsLayer(experts.module, first_key, experts.count, layout, dtype, module, activation))
        first_key += experts.count
    return layers
