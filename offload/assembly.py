"""From a prepared model to a running one: store, dense weights, tiers."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedModel

from offload.devices.host import HostDevice
from offload.devices.host_accelerator import HostAccelerator
from offload.errors import UnsupportedOperationError
from offload.hf.adopt import adopt
from offload.hf.dtypes import DTYPE_OF_FORMAT
from offload.hf.fused import fuse
from offload.moe.gate import recognise_gate
from offload.moe.layer import ExpertsLayer
from offload.preparation import Prepared
from offload.request import FUSED_KINDS, AcceleratorRequest
from offload.runtime import Runtime
from offload.store.convert import convert, find_store
from offload.store.progress import NoProgress, Progress
from offload.store.store import ExpertStore
from offload.store.writer import conversion_nbytes
from placement.plan import Plan
from prefetch.policies.lru import LruPolicy


def assemble(
    prepared: Prepared,
    store_root: Path,
    progress: Progress,
    fused: Iterable[str] = FUSED_KINDS,
    accelerator: AcceleratorRequest | None = None,
) -> PreTrainedModel:
    """Convert unless the store is there, load dense weights, start the runtime.

    When every expert has a slot, all are read now; otherwise slots fill as experts are needed.

    Args:
        prepared: the model.
        store_root: directory of stores.
        progress: told of what takes time.
        fused: kinds of modules that kernels compute.
        accelerator: what the plan's VRAM is, None for a plan without.

    Raises:
        UnsupportedOperationError: the plan puts more into VRAM than experts, which this runtime does not execute yet.
    """
    try:
        _check_vram(prepared.plan, accelerator)
        store, model = _store_and_model(prepared, store_root, progress)
    finally:
        prepared.close()
    device = HostDevice()
    above = None if accelerator is None else HostAccelerator(accelerator.vram_nbytes, accelerator.link)
    runtime = Runtime(prepared.plan, prepared.spec, store, _layers(model, prepared), device, LruPolicy(), above)
    try:
        adopt(model, runtime)
        runtime.fused = fuse(model, fused, runtime)
        if above is not None or prepared.plan.ram_slots == prepared.plan.expert_count:
            runtime.preload(progress)
    except BaseException:
        runtime.close()
        raise
    return model


def _check_vram(plan: Plan, accelerator: AcceleratorRequest | None) -> None:
    vram = plan.vram
    if vram is not None and (accelerator is None or vram.dense_layers or vram.head):
        raise UnsupportedOperationError(
            f"the plan of {plan.model} puts dense weights or experts into a GPU's memory, which this version plans and "
            'does not run yet; load with ram= and nvme= alone, or with device="host"'
        )


def _store_and_model(prepared: Prepared, store_root: Path, progress: Progress) -> tuple[ExpertStore, PreTrainedModel]:
    """Convert and load dense weights; both at once where the plan has the memory, for the disk waits for neither."""
    store = find_store(prepared.bundles, store_root)
    if store is not None:
        return store, prepared.finish(progress)
    ram = prepared.plan.ram
    beside_dense = ram.total_nbytes - ram.dense_nbytes - prepared.spec.load_scratch_nbytes
    if not prepared.finishes_beside_conversion or beside_dense < conversion_nbytes(prepared.bundles.groups):
        store = convert(prepared.bundles, store_root, progress=progress, memory_nbytes=ram.total_nbytes)
        return store, prepared.finish(progress)
    # Only the conversion, which takes longer, shows a bar; it stays on this thread, where an interrupt arrives.
    with ThreadPoolExecutor(1, thread_name_prefix="dense-loader") as loader:
        finished = loader.submit(prepared.finish, NoProgress())
        store = convert(prepared.bundles, store_root, progress=progress)
        return store, finished.result()


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
