"""From a prepared model to a running one: store, dense weights, tiers."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from offload.copy_ahead import CopyAhead
from offload.devices.base import Accelerator, Device, KvAccelerator
from offload.devices.host import HostDevice
from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import parse_link
from offload.errors import InvalidArgumentError, SlowReadWarning
from offload.hf.adopt import adopt
from offload.hf.attention_plans import avoid_plans
from offload.hf.dense_placement import DensePlacement
from offload.hf.dtypes import DTYPE_OF_FORMAT
from offload.hf.fused import fuse
from offload.hf.graphs.runner import use_step_graphs
from offload.hf.lookahead import find_routers, look_ahead
from offload.hf.paged.adopt import page_caches
from offload.hf.paged.prefixes import Prefixes, begin_prompts
from offload.hf.router_scores import hear_routers
from offload.kernel_preparation import compile_ahead, prepare_kernels
from offload.kv.paging import Paging
from offload.kv.prefix_files import PrefixFiles
from offload.learnt import restore_learnt
from offload.moe.gate import recognise_gate
from offload.moe.layer import ExpertsLayer
from offload.prefetcher import Prefetcher
from offload.preparation import Prepared
from offload.reconciliation import MemoryUse
from offload.request import DEFAULT_LINK, FUSED_KINDS, AcceleratorRequest
from offload.runtime import Runtime
from offload.scores import RouterScores
from offload.store.convert import convert, find_store
from offload.store.progress import NoProgress, Progress
from offload.store.store import ExpertStore
from offload.store.writer import conversion_nbytes
from placement.kv import KvPlan
from placement.kv_sparsity import KvSparsity
from placement.plan import Plan
from prefetch.controller import Controller
from prefetch.learning import Learner
from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.named import name_of
from prefetch.predictors.predictor import Predictor
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.named import make_scheduler
from profiler.memory import available_ram_nbytes


def assemble(
    prepared: Prepared,
    store_root: Path,
    progress: Progress,
    fused: Iterable[str] = FUSED_KINDS,
    policy: str | CachePolicy = "auto",
    prefetch: str = "off",
    accelerator: AcceleratorRequest | None = None,
    sparsity: KvSparsity | None = None,
    *,
    scheduler: str | StepScheduler = "auto",
    predictor: str | LayerPredictor = "auto",
    step_graph: bool = False,
) -> PreTrainedModel:
    """Convert unless the store is there, load dense weights, start the runtime.

    When every expert has a slot, all are read now; otherwise slots fill as experts are needed.

    Args:
        prepared: the model.
        store_root: directory of stores.
        progress: told of what takes time.
        fused: kinds of modules that kernels compute.
        policy: see `Request`.
        prefetch: see `Request`.
        accelerator: what the plan's VRAM is, None for a plan without.
        sparsity: how KV caches in blocks are attended to in part, None for all of them.
        scheduler: see `Request`.
        predictor: see `Request`.
        step_graph: replay decode steps as graphs, on the accelerator.

    Raises:
        DeviceError: the GPU is not there.
        InvalidArgumentError: the predictor is of another geometry.
    """
    memory = MemoryUse.now()
    with ExitStack() as unless_made:
        with closing(prepared):
            _check_geometry(predictor, prepared)
            above = None if accelerator is None else _accelerator(accelerator, prepared.plan)
            if above is not None:
                unless_made.callback(above.release)
            store, model = _store_and_model(prepared, store_root, progress)
        runtime = _runtime(prepared, store, model, progress, fused, policy, above, scheduler, step_graph=step_graph)
        unless_made.pop_all()
    runtime.memory = memory
    device = runtime.device
    layers = runtime.layers
    try:
        adopt(model, runtime)
        if above is not None and prepared.plan.vram is not None and prepared.plan.vram.head:
            runtime.dense = DensePlacement(model, prepared.plan.vram, above)
        on_cpu = model.device.type == "cpu"
        # Those are the CPU's kernels; a graph is made of torch's operations.
        runtime.fused = fuse(model, fused if on_cpu and not step_graph else (), runtime)
        if prepared.plan.kv is not None:
            runtime.paging = _page(model, prepared.plan.kv, device, store_root, sparsity, above)
        # Dense weights that lie in an accelerator's memory are in place only while their layer runs.
        if on_cpu and runtime.dense is None:
            # A cache in blocks is attended to by its own ways.
            attends = runtime.fused.get("attention", 0) > 0 and prepared.plan.kv is None
            prepare_kernels(model, layers, attends=attends)
        if prefetch != "off":
            _prefetch(model, runtime, prefetch, predictor)
        _tell_scores(model, runtime, step_graph=step_graph)
        if step_graph:
            runtime.graphs = use_step_graphs(model, runtime)
        if accelerator is not None and accelerator.device != "host":
            avoid_plans(model)
        _go_on_learning(runtime)
        if above is not None or prepared.plan.ram_slots == prepared.plan.expert_count:
            runtime.preload(progress)
    except BaseException:
        runtime.close()
        raise
    return model


def _runtime(
    prepared: Prepared,
    store: ExpertStore,
    model: PreTrainedModel,
    progress: Progress,
    fused: Iterable[str],
    policy: str | CachePolicy,
    above: Accelerator | None,
    scheduler: str | StepScheduler,
    *,
    step_graph: bool,
) -> Runtime:
    """What executes the plan, after its kernels were compiled; arguments as of `assemble`."""
    layers, plan = _layers(model, prepared), prepared.plan
    compile_ahead(
        model, layers, progress, fused=frozenset(fused) if above is None and not step_graph else (),
        with_policy=policy == "auto" and plan.ram_slots < plan.expert_count,
        spare_ram_nbytes=available_ram_nbytes() - plan.peak_ram_nbytes,
    )  # fmt: skip
    if above is not None:
        most_pairs = plan.workload.batch * prepared.spec.top_k
        above.prepare(layers, most_pairs, progress)
    above_policy = None if plan.vram is None else _policy(copy.deepcopy(policy), plan.vram.slots, layers)
    device = HostDevice() if above is None else above.host()
    return Runtime(
        plan, prepared.spec, store, layers, device, _policy(policy, plan.ram_slots, layers), above, above_policy,
        make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler,
    )  # fmt: skip


def _check_geometry(predictor: str | LayerPredictor, prepared: Prepared) -> None:
    """Before anything is read: whether a user's predictor is of the model's layers.

    Raises:
        InvalidArgumentError: it is not, naming both.
    """
    counts = tuple(experts.count for experts in prepared.spec.experts)
    if not isinstance(predictor, str) and predictor.geometry.counts != counts:
        raise InvalidArgumentError(
            f"predictor={predictor!r}: made for layers of {predictor.geometry.counts} experts, but "
            f"{prepared.plan.model} has layers of {counts}; make it with Geometry({counts})"
        )


def _accelerator(request: AcceleratorRequest, plan: Plan) -> Accelerator:
    """The device that the plan's VRAM is on."""
    if plan.vram is None:
        raise ValueError(f"the plan of {plan.model} puts nothing into VRAM")
    if request.device == "host":
        return HostAccelerator(plan.vram.budget_nbytes, parse_link(request.link or DEFAULT_LINK))
    from offload.devices.cuda import CudaDevice
    from offload.devices.cuda_driver import open_cuda

    driver = open_cuda(request.device)
    use = plan.vram.use
    # Blocks of a KV cache lie in a slab, a cache without blocks in torch's memory.
    kv = use.kv_nbytes if plan.kv is None else 0
    return CudaDevice(driver, plan.vram.budget_nbytes - kv - use.activation_nbytes, plan.vram.budget_nbytes)


def _page(
    model: PreTrainedModel,
    plan: KvPlan,
    device: Device,
    store_root: Path,
    sparsity: KvSparsity | None,
    above: Accelerator | None,
) -> Paging:
    """Keep KV caches in blocks, in an accelerator's memory, in RAM and in a file beside the expert stores.

    Raises:
        DoesNotFitError: the accelerator has not the memory that the plan gives them.
    """
    accelerator = above if isinstance(above, KvAccelerator) else None
    paging = Paging(
        device, plan.ram_nbytes, store_root, plan.format, sparsity=sparsity, accelerator=accelerator,
        vram_nbytes=plan.vram_nbytes,
    )  # fmt: skip
    paging.reserve()
    page_caches(model, paging)
    return paging


def keep_prefixes(model: PreTrainedModel, store_root: Path, budget_nbytes: int) -> None:
    """Let a loaded model, whose KV cache lies in blocks, save prefixes beside the expert stores and begin with them."""
    runtime: Any = model.offload
    if runtime.paging is None:
        raise InvalidArgumentError("prefix_cache=: no layer of this model keeps keys and values of all tokens")
    plan = runtime.plan
    # What keys and values depend on besides the tokens: weights and how they are rounded, arithmetic, and versions.
    identity = {
        "checkpoint": runtime.store.manifest.identity,
        "experts": plan.format,
        "dense": plan.dense_format,
        "dtype": str(model.dtype),
        "kv": runtime.paging.format,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    files = PrefixFiles(store_root / "prefixes", budget_nbytes, json.dumps(identity))
    runtime.prefixes = Prefixes(model, runtime.paging, files, plan.workload.prefill_chunk_tokens)
    begin_prompts(model, runtime.prefixes)


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


def _policy(policy: str | CachePolicy, slots: int, layers: Sequence[ExpertsLayer]) -> CachePolicy:
    """The policy of a tier of so many slots."""
    if not isinstance(policy, str):
        return policy
    geometry = Geometry(tuple(layer.count for layer in layers))
    if not layers or (policy == "auto" and slots >= geometry.total):
        # Nothing leaves while the budget holds: what costs least will do.
        policy = "lru"
    return make_policy(policy, geometry)


def _prefetch(model: PreTrainedModel, runtime: Runtime, prefetch: str, predictor: str | LayerPredictor) -> None:
    """Read ahead where there is something to read and somebody to foresee it."""
    plan, accelerated = runtime.plan, runtime.accelerated
    if (plan.ram_slots == plan.expert_count and accelerated is None) or len(runtime.layers) < 2:
        return
    routers = find_routers(model, runtime.layers)
    if routers is None:
        if prefetch == "on":
            warnings.warn(
                f"prefetch=: the routers of {plan.model} are not of a form that is known; experts are not read ahead",
                SlowReadWarning,
                stacklevel=2,
            )
        return
    top_k = [experts.top_k for experts in runtime.spec.experts]
    controller = Controller() if prefetch == "auto" else None
    copies = None if accelerated is None else CopyAhead(accelerated, runtime.layers, runtime.geometry)
    if isinstance(predictor, str):
        predictor = Predictor(runtime.geometry, source=predictor)
    prefetcher = Prefetcher(runtime.tier, predictor, top_k, controller, runtime.lock, copies)
    runtime.observer.prefetcher = prefetcher
    look_ahead(routers, runtime.layers, prefetcher)


def _tell_scores(model: PreTrainedModel, runtime: Runtime, *, step_graph: bool) -> None:
    """Have policies that want routers' scores told of them, where experts have to give way."""
    total = runtime.plan.expert_count
    policies = [tier.policy for tier in runtime.tiers() if tier.policy.wants_scores and tier.table.usable_slots < total]
    if not policies:
        return
    # A replayed graph calls no router.
    routers = None if step_graph else find_routers(model, runtime.layers)
    if routers is None:
        reason = "step_graph=True calls none" if step_graph else "they are not of a form that is known"
        warnings.warn(
            f"policy=: {type(policies[0]).__name__} goes by uses, not by the scores of the routers of "
            f"{runtime.plan.model}: {reason}",
            SlowReadWarning,
            stacklevel=2,
        )
        return
    runtime.observer.scores = RouterScores(policies, [layer.first_key for layer in runtime.layers])
    hear_routers(routers, runtime.layers, runtime.observer.scores)


def _go_on_learning(runtime: Runtime) -> None:
    """What learns while the model runs goes on from where the last run ended; `Runtime.close` keeps it."""
    prefetcher = runtime.observer.prefetcher
    candidates: dict[str, object] = {"policy": runtime.tier.policy}
    if prefetcher is not None:
        # What one source's weights learnt means nothing to another's.
        name = name_of(prefetcher.predictor)
        candidates["predictor" if name == "auto" else f"predictor {name}"] = prefetcher.predictor
    runtime.learners = {name: one for name, one in candidates.items() if isinstance(one, Learner)}
    if runtime.learners:
        restore_learnt(runtime.store, runtime.learners)


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
