"""`offload.load`: the first line of the architecture, walked once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from offload.allocator import return_large_blocks
from offload.errors import InvalidArgumentError
from offload.kept_products import keep_few_products
from offload.progress import progress_bar
from offload.request import PREFILL_CHUNK_TOKENS, Request, make_request

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from offload.preparation import Prepared
    from placement.plan import Plan
    from prefetch.policies.base import CachePolicy
    from prefetch.predictors.base import LayerPredictor
    from prefetch.scheduler.base import StepScheduler


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    ram: int | str | None = None,
    nvme: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    batch: int = 1,
    prefill_chunk: int | str = PREFILL_CHUNK_TOKENS,
    max_memory: Mapping[str | int, int | str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quant: str | Mapping[str, str | None] | None = None,
    fused: bool | Iterable[str] = True,
    policy: str | CachePolicy = "auto",
    prefetch: bool | str = False,
    scheduler: str | StepScheduler = "auto",
    predictor: str | LayerPredictor = "auto",
    device: str | None = None,
    vram: int | str | None = None,
    link: str | None = None,
    kv: str = "auto",
    kv_ram: int | str | None = None,
    kv_vram: int | str | None = None,
    kv_sparsity: str | None = None,
    prefix_cache: int | str | None = None,
    step_graph: bool = False,
    progress: bool | None = None,
) -> PreTrainedModel:
    """A transformers model whose experts lie on disk and, as far as the budget goes, in RAM.

    What comes back is the transformers class itself, in `eval()`; `generate()` gives what it gives with everything
    in memory. `model.offload` is the runtime: `plan`, `stats()`, `close()`, a context manager.

    Args:
        model: a directory, a Hub id, or a transformers model: in memory (its experts are freed) or on meta together
            with `checkpoint`.
        ram: bound on all that the runtime holds in host memory, as "24GiB" (2^30), "24GB" (10^9) or bytes. None
            takes nine tenths of what is available.
        nvme: directory of the expert store, on the fastest disk. None takes ~/.cache/offload.
        dtype: "auto" for the checkpoint's own, or bfloat16, float16, float32.
        context: longest sequence in tokens that the KV share holds; longer ones take expert slots.
        batch: sequences at once that the KV share holds.
        prefill_chunk: prompt tokens that `generate` puts through the model at once. "auto" takes what this machine's
            profile predicts to be fastest within the budget, and the last bits of outputs then depend on both.
        max_memory: accelerate's spelling of `ram`: {"cpu": "24GiB"}.
        checkpoint: directory or Hub id of the weights of a model on meta.
        revision: of a Hub repository.
        trust_remote_code: allow a checkpoint to bring modeling code.
        attn_implementation: transformers' name of one; None for its own choice.
        quant: packed formats: "int8", "int4", "mxfp4" or "fp8_e4m3" for the whole model, or some of {"experts": ...,
            "dense": ..., "lm_head": ...}. "int4" and "mxfp4" alone keep the output layer in int8. None rounds nothing.
            "auto", for all or a part, leaves the format to the planner: of the model's own, int8 and int4 the most
            precise that this machine's profile predicts to be within 6% of the fastest within the budget, for a prompt
            of 512 and 128 new tokens. `plan.format_options` says what was weighed.
        fused: which chains of small operations kernels compute in one: some of "attention", "decoder" (a whole decode
            step), "kv_cache", "linear", "rms_norm", "rotary", or all, or none. Equal up to rounding; `stats().fused`
            says how often each applies.
        policy: which expert gives way to which: "lru", "lfu", "mrs", "window", "frequency-recency", "arc",
            "lfu-quotas", "lfu-shallow-first", "forecast", which learns, "auto" for that one where not all experts
            have slots, or a `prefetch.policies.base.CachePolicy`. Each tier has one of its own; of an object, a copy.
        prefetch: read experts of later layers ahead while one sequence is decoded: False for never, True for always,
            "auto" for as long as that is measured to pay. With `vram`, those of the next layer are also copied
            there ahead. Neither changes the output.
        scheduler: how a step's experts are gone through: "auto" computes them as they come, and with `vram` copies
            those there first with which the step ends earliest; "off" computes those in RAM in ascending order, each
            waited for in turn, and copies none for the step; or a `prefetch.scheduler.base.StepScheduler`. It never
            changes the output.
        predictor: what `prefetch` goes by: "auto" for all sources together, one of "router", "transition", "previous",
            "popularity" alone, or a `prefetch.predictors.base.LayerPredictor` of the model's geometry.
        device: "cuda" or "cuda:N": dense weights, KV cache (where it does not fit, its newest blocks) and hot
            experts on a GPU; docs/gpu.md says what has met one.
            "host": the CPU, and with `vram` an accelerator that host memory plays, so that all three tiers run
            without a GPU. Experts there are computed by the CPU kernels: outputs are the same, speed is not a GPU's.
        vram: of a GPU's memory what may be used, None for all that is free; of "host" the size of its accelerator's,
            which takes as much of the host's beside `ram`.
        link: bytes per second to the host's accelerator, such as "25GB/s", which is the default.
        kv: format of the KV cache: "auto" for the model's dtype, "bf16", "fp16", "fp32", or, rounding what is older
            than 128 tokens, "fp8", "int8" or "int4". In the model's dtype it stays one that grows in place while it
            fits; otherwise it lies in blocks, in RAM and beyond that on disk, and is attended there.
        kv_ram: bound on the memory of such blocks, as `ram`; None for what the plan gives them.
        kv_vram: of an accelerator's memory how much holds the newest blocks, which it attends to while the CPU attends
            to the others; the cache then lies in blocks. None for what the plan gives them where it does anyway, 0 for
            none. With `device="host"` the output is the same; on CUDA its last bits depend on where blocks are.
        kv_sparsity: attention to a part of the KV cache, which is lossy: a method and the share that it keeps, as
            "top-k:0.05". "top-k" attends to the best of all blocks, "snapkv" keeps a part of the prompt, "h2o" the
            blocks with most attention and the newest; `stats().kv.sparsity` says how much of exact attention they have.
            The cache then lies in blocks. None attends to all of it.
        prefix_cache: bound on the bytes of saved prefixes, beside the expert stores: `model.offload.save_prefix()`
            keeps the KV cache of a token sequence, and `generate()` begins prompts with the longest that fits. The KV
            cache then lies in blocks. None keeps none.
        step_graph: with an accelerator, replay decode steps as one graph each: no Python between their layers. Experts
            move between steps only. The first step of a graph is also done layer by layer, and compared; steps that no
            graph takes go layer by layer, and `stats().graphs` says why. The last bits of outputs depend on where
            experts are. On CUDA **no GPU has run it yet**: docs/gpu.md. With "host" it shows what would be captured;
            the small operations are then torch's own, whatever `fused` says.
        progress: show bars; None where stderr is a terminal and HF_HUB_DISABLE_PROGRESS_BARS is not set.

    Raises:
        DoesNotFitError: `minimum_ram_bytes` is what would do; raised before any weight is read.
        DeviceError: the GPU that was asked for is not there, or torch cannot use it.
        InvalidArgumentError, CheckpointError, UnsupportedModelError, StoreError, StorageError: see `offload.errors`.
    """
    request = make_request(
        ram=ram, nvme=nvme, context=context, batch=batch, prefill_chunk=prefill_chunk, max_memory=max_memory,
        fused=fused, quant=quant, policy=policy, prefetch=prefetch, scheduler=scheduler, predictor=predictor,
        device=device, vram=vram, link=link, kv=kv, kv_ram=kv_ram, kv_vram=kv_vram, kv_sparsity=kv_sparsity,
        prefix_cache=prefix_cache, step_graph=step_graph,
    )  # fmt: skip
    _check_device(request)
    return_large_blocks()
    keep_few_products()
    prepared = _prepare(
        model, request, checkpoint, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    from offload.assembly import assemble, keep_prefixes

    loaded = assemble(
        prepared, request.store_root, progress_bar(progress), request.fused, request.policy, request.prefetch,
        request.accelerator, request.kv.sparsity, scheduler=request.scheduler, predictor=request.predictor,
        step_graph=request.step_graph,
    )  # fmt: skip
    if request.prefixes_nbytes is not None:
        keep_prefixes(loaded, request.store_root, request.prefixes_nbytes)
    return loaded


def _check_device(request: Request) -> None:
    """Before anything is read: whether the GPU that was asked for is there."""
    if request.accelerator is not None and request.accelerator.device != "host":
        from offload.devices.cuda_driver import open_cuda

        open_cuda(request.accelerator.device)


def plan(
    model: str | os.PathLike[str],
    *,
    ram: int | str | None = None,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    batch: int = 1,
    prefill_chunk: int | str = PREFILL_CHUNK_TOKENS,
    max_memory: Mapping[str | int, int | str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quant: str | Mapping[str, str | None] | None = None,
    kv: str = "auto",
    kv_ram: int | str | None = None,
    kv_sparsity: str | None = None,
) -> Plan:
    """What `load` would do with the same arguments, from headers alone; downloads nothing.

    Raises:
        CheckpointNotFoundError: a Hub id that is not in the local cache.
        As `load`, before anything is read.
    """
    request = make_request(
        ram=ram, nvme=None, context=context, batch=batch, prefill_chunk=prefill_chunk, max_memory=max_memory,
        quant=quant, kv=kv, kv_ram=kv_ram, kv_sparsity=kv_sparsity,
    )  # fmt: skip
    from offload.preparation import prepare_checkpoint

    prepared = prepare_checkpoint(
        model, request, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation, local_files_only=True,
    )  # fmt: skip
    prepared.checkpoint.close()
    return prepared.plan


def _prepare(
    model: str | os.PathLike[str] | PreTrainedModel,
    request: Request,
    checkpoint: str | os.PathLike[str] | None,
    **options: Any,
) -> Prepared:
    from offload.preparation import prepare_checkpoint, prepare_model

    if isinstance(model, (str, os.PathLike)):
        if checkpoint is not None:
            raise InvalidArgumentError("checkpoint= goes with a transformers model on meta, not with a path or Hub id")
        return prepare_checkpoint(model, request, **options)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError(f"model={model!r}: expected a directory, a Hub id or a transformers model")
    given = [name for name in ("revision", "attn_implementation") if options[name] is not None]
    given += [name for name, default in (("dtype", "auto"), ("trust_remote_code", False)) if options[name] != default]
    if given:
        raise InvalidArgumentError(f"{', '.join(given)}: decided by the transformers model that was given")
    if checkpoint is None:
        return prepare_model(model, request)
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise InvalidArgumentError("checkpoint= goes with a model on meta; this one has weights in memory")
    return prepare_checkpoint(checkpoint, request, skeleton=model.eval().requires_grad_(False))
