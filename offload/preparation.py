"""From what the user named to a plan: headers are read, weights are not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from formats.packed import PACKED_FORMATS
from offload.checkpoint.bundles import CheckpointBundleSource
from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.decoded import decoded_tensors, decoding_nbytes
from offload.checkpoint.dtypes import TAGS, TORCH_DTYPES
from offload.checkpoint.experts import MappedExperts, map_checkpoint
from offload.checkpoint.lazy import lazy_state_dict
from offload.checkpoint.locate import locate_checkpoint
from offload.checkpoint.quantised import drop_quantisation, take_encoding
from offload.errors import DoesNotFitError, InvalidArgumentError, SlowKvWarning
from offload.format_choice import fastest_format
from offload.hf.dense import load_dense
from offload.hf.dense_weights import alignment_nbytes
from offload.hf.dtypes import FORMAT_OF_DTYPE, resolve_dtype
from offload.hf.experts_interface import experts_modules, remove_expert_weights, use_offload_experts
from offload.hf.layer_kinds import decoder_layers
from offload.hf.model_source import ModelBundleSource
from offload.hf.quantise import linears_to_quantise, put_back, quantise_loaded, readable_alone, take_out
from offload.hf.skeleton import config_dtype, make_skeleton, read_config
from offload.hf.spec import build_spec, measured_once
from offload.kv_check import check_kv
from offload.machine_profile import cached_profile
from offload.quantisation import Quantisation
from offload.request import DEFAULT_CONTEXT_TOKENS, AcceleratorRequest, Request
from offload.sizes import format_size
from offload.store.progress import Progress
from offload.store.source import BundleSource
from placement.hardware_profile import HardwareProfile
from placement.kv_settings import PIECES_NBYTES
from placement.memory_use import vram_beside_weights
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan, with_prediction
from placement.prefill_chunk import choose_chunk
from placement.tensors import TensorSpan
from placement.vram_planner import with_vram
from placement.workload import Workload


class Prepared(Protocol):
    """A model that is planned and can be loaded.

    Attributes:
        spec: its sizes.
        plan: where everything goes.
        bundles: its experts, to be converted.
        finishes_beside_conversion: whether `finish` may run, on another thread, while the experts are converted.
    """

    spec: ModelSpec
    plan: Plan
    bundles: BundleSource
    finishes_beside_conversion: ClassVar[bool]

    def finish(self, progress: Progress) -> PreTrainedModel:
        """The model with its dense weights in place and its experts' parameters gone; call once."""
        ...

    def close(self) -> None:
        """Close its files; call when nothing is converted or read any more."""
        ...


@dataclass
class PreparedCheckpoint:
    """A model that lies in files; `profile` is what predicted its plan, None where nothing could."""

    spec: ModelSpec
    plan: Plan
    bundles: BundleSource
    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    dense: dict[str, TensorSpan]
    renamed: dict[str, str]
    formats: dict[str, str]
    alone: list[str]
    profile: HardwareProfile | None
    finishes_beside_conversion: ClassVar[bool] = True

    def finish(self, progress: Progress) -> PreTrainedModel:
        """Read the dense weights into the skeleton; those that are quantised one at a time, packed as they come."""
        progress.start(sum(span.nbytes for span in self.dense.values()), "loading dense weights")
        try:
            tensors = lazy_state_dict(self.checkpoint, self.dense, once=True, on_read=progress.advance)
            taken = take_out(self.skeleton, self.formats, self.alone)
            keys = {parameter: self.renamed[parameter] for layer in taken for parameter in layer.parameters}
            alone = set(keys.values())
            dtype = self.skeleton.dtype
            shared = {key: tensor for key, tensor in tensors.items() if key not in alone}
            load_dense(self.skeleton, shared, dtype, str(self.checkpoint.directory))
            put_back(self.skeleton, taken, lambda parameter: tensors[keys[parameter]].encoded())
            left = {name: format for name, format in self.formats.items() if name not in self.alone}
            quantise_loaded(self.skeleton, left)
        finally:
            progress.finish()
        self.checkpoint.check_unchanged()
        return self.skeleton

    def close(self) -> None:
        """Close the checkpoint."""
        self.checkpoint.close()


@dataclass
class PreparedModel:
    """A model that is in memory."""

    spec: ModelSpec
    plan: Plan
    bundles: BundleSource
    model: PreTrainedModel
    formats: dict[str, str]
    finishes_beside_conversion: ClassVar[bool] = False

    def close(self) -> None:
        """There is nothing to close."""

    def finish(self, progress: Progress) -> PreTrainedModel:
        """Free the experts' parameters; the rest stays as it is."""
        for _, module in experts_modules(self.model):
            remove_expert_weights(module)
        use_offload_experts(self.model)
        quantise_loaded(self.model, self.formats)
        self.model.eval().requires_grad_(False)
        return self.model


def prepare_checkpoint(
    name: str | os.PathLike[str],
    request: Request,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    skeleton: PreTrainedModel | None = None,
) -> PreparedCheckpoint:
    """Plan a checkpoint from its headers.

    Args:
        name: directory or Hub id.
        request: budgets and workload.
        dtype: in which to compute, "auto" for the checkpoint's own.
        revision: of the Hub repository.
        local_files_only: download nothing.
        trust_remote_code: allow modeling code from the checkpoint.
        attn_implementation: transformers' name of one, None for its own choice.
        skeleton: a model on meta to be filled, None to make one from the checkpoint's config.

    Raises:
        CheckpointError, UnsupportedModelError: see `offload.errors`.
        DoesNotFitError: the budget is too small; nothing but headers was read.
    """
    directory = locate_checkpoint(name, revision=revision, local_files_only=local_files_only)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    encoding = take_encoding(config, str(directory / "config.json"))
    checkpoint = Checkpoint.open(directory)
    try:
        stored = _first_dtype(checkpoint) if encoding is None else torch.bfloat16
        if skeleton is None:
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            if attn_implementation is not None:
                options["attn_implementation"] = attn_implementation
            skeleton = make_skeleton(config, resolve_dtype(dtype, config_dtype(config), stored), **options)
            skeleton.config.name_or_path = str(name)
            _adopt_generation_config(skeleton, directory)
        drop_quantisation(skeleton.config)
        compute = skeleton.dtype
        tensors = checkpoint.tensors
        if encoding is not None:
            tensors = decoded_tensors(tensors, encoding, TAGS[compute])
        mapped = map_checkpoint(skeleton, tensors)
        context = _context(request, skeleton)
        casts = _any_cast(mapped.experts, compute)
        cast = FORMAT_OF_DTYPE[compute]
        measured = measured_once(skeleton)

        def in_formats(quantisation: Quantisation) -> _Formatted:
            format = quantisation.experts or cast
            bundles = CheckpointBundleSource(checkpoint, mapped.experts, compute, format, str(name), once=True)
            formats = linears_to_quantise(skeleton, quantisation)
            alone = readable_alone(skeleton, formats, mapped.renamed)
            spec = build_spec(
                skeleton, bundles.groups, measured(), name=str(name), context_tokens=context, casts=casts,
                formats=formats, alone=alone, quantisation=quantisation, decoding_nbytes=decoding_nbytes(mapped.dense),
            )  # fmt: skip
            return _Formatted(spec, bundles, formats, alone)

        own = None if encoding is None else encoding.packed_format
        made, plan, profile = _planned(request, own, in_formats, context, skeleton)
        return PreparedCheckpoint(
            made.spec, plan, made.bundles, checkpoint, skeleton, mapped.dense, mapped.renamed, made.formats, made.alone,
            profile,
        )  # fmt: skip
    except BaseException:
        checkpoint.close()
        raise


def prepare_model(model: PreTrainedModel, request: Request) -> PreparedModel:
    """Plan a model that has its weights in memory; it is not changed before `finish`.

    Raises:
        InvalidArgumentError: its weights are not on the CPU.
        DoesNotFitError: the budget is too small.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise InvalidArgumentError(
            f"the model's weights are on {', '.join(sorted(devices))}: wrap a model on the CPU, "
            "or one on meta together with checkpoint="
        )
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    skeleton = make_skeleton(model.config, model.dtype)
    context = _context(request, skeleton)
    measured = measured_once(skeleton)

    def in_formats(quantisation: Quantisation) -> _Formatted:
        bundles = ModelBundleSource(model, name, quantisation.experts)
        formats = linears_to_quantise(skeleton, quantisation)
        alone = [*formats]
        spec = build_spec(
            skeleton, bundles.groups, measured(), name=name, context_tokens=context, casts=False, formats=formats,
            alone=alone, quantisation=quantisation,
        )  # fmt: skip
        return _Formatted(spec, bundles, formats, alone)

    made, plan, _ = _planned(request, None, in_formats, context, skeleton)
    return PreparedModel(made.spec, plan, made.bundles, model, made.formats)


@dataclass(frozen=True)
class _Formatted:
    """A model in certain formats; see `PreparedCheckpoint`."""

    spec: ModelSpec
    bundles: BundleSource
    formats: dict[str, str]
    alone: list[str]


def _planned(
    request: Request,
    own: str | None,
    in_formats: Callable[[Quantisation], _Formatted],
    context: int,
    skeleton: PreTrainedModel,
) -> tuple[_Formatted, Plan, HardwareProfile | None]:
    """The model in the formats that were asked for or, where those are left open, in the best; its plan; and the
    profile that predicted it, None where nothing could.
    """
    choices = [in_formats(one) for one in request.quantisation.candidates(own)]
    profile_for = profiles_for(request.store_root)
    best, plan = fastest_format(
        [one.spec for one in choices], lambda spec: _plan(spec, request, context, skeleton, profile_for(spec))
    )
    return choices[best], plan, profile_for(choices[best].spec)


def _plan(
    spec: ModelSpec, request: Request, context: int, skeleton: PreTrainedModel, profile: HardwareProfile | None
) -> Plan:
    check_kv(spec, request.kv, request.batch)

    def planned(workload: Workload) -> Plan:
        return make_plan(spec, workload, request.ram_nbytes, profile, kv=request.kv)

    workload = Workload(context, request.batch)
    try:
        if request.prefill_chunk_tokens is not None:
            workload = replace(workload, prefill_chunk_tokens=request.prefill_chunk_tokens)
        elif profile is None:
            raise InvalidArgumentError(
                'prefill_chunk="auto": chosen by predicted speed, and there is no profile of this machine for '
                f"{spec.name}; run `offload profile`, or give a number of tokens"
            )
        else:
            workload = choose_chunk(workload, planned)
        plan = planned(workload)
    except PlanInfeasibleError as error:
        minimum = error.minimum_ram_nbytes
        raise DoesNotFitError(
            f"{error}. Give ram={minimum} ({format_size(minimum)}) or more, or a shorter context than {context} tokens"
            f"{_or_fewer_bits(spec)}",
            minimum_ram_bytes=minimum,
        ) from error
    if request.accelerator is None:
        return plan
    try:
        return _with_vram(spec, plan, request.accelerator, skeleton, request.kv.vram_nbytes, profile)
    except DoesNotFitError:
        if request.accelerator.device == "host" or plan.kv is not None:
            raise
        below = _with_kv_below(spec, request, plan.workload, skeleton, profile)
        if below is None:
            raise
        return below


def _or_fewer_bits(spec: ModelSpec) -> str:
    """Of a dense model that is not packed: what would become of its weights, which have to be in RAM."""
    linears = [one for layer in spec.layers for one in layer.linears]
    if spec.experts or spec.dense_format in PACKED_FORMATS or not linears:
        return ""
    saved = sum(one.nbytes - replace(one, format="int4").nbytes for one in linears)
    return f', or quant="int4", with which dense weights take about {format_size(spec.dense_nbytes - saved)}'


def _with_kv_below(
    spec: ModelSpec,
    request: Request,
    workload: Workload,
    skeleton: PreTrainedModel,
    profile: HardwareProfile | None,
) -> Plan | None:
    """For a GPU whose memory does not hold the KV cache: the plan with blocks, as many as there is room for above; None
    where that does not fit either.
    """
    assert request.accelerator is not None
    if not any(shape is not None for shape in spec.kv_shapes):
        return None
    kv = replace(request.kv, blocks=True)
    try:
        plan = make_plan(spec, workload, request.ram_nbytes, profile, kv=kv)
        plan = _with_vram(spec, plan, request.accelerator, skeleton, kv.vram_nbytes, profile)
    except (PlanInfeasibleError, DoesNotFitError):
        return None
    assert plan.kv is not None
    warnings.warn(
        f"the KV cache of {workload.context_tokens} tokens does not fit into vram={request.accelerator.vram_nbytes} "
        f"beside the layers of {spec.name}: it lies in blocks, the newest {plan.kv.vram_tokens} tokens in VRAM, the "
        "others in RAM and on disk, where the CPU attends to them",
        SlowKvWarning,
        stacklevel=2,
    )
    return plan


def _with_vram(
    spec: ModelSpec,
    plan: Plan,
    accelerator: AcceleratorRequest,
    skeleton: PreTrainedModel,
    kv_vram_nbytes: int | None,
    profile: HardwareProfile | None,
) -> Plan:
    """The plan with the accelerator's memory put to use.

    With a prediction where the profile has measured the GPU; of an accelerator that host memory plays nothing is.
    """
    on_gpu = accelerator.device != "host"
    budget = accelerator.vram_nbytes
    layers = [layer for _, layer in decoder_layers(skeleton)]
    quantised = plan.dense_format != plan.head_format or plan.dense_format in PACKED_FORMATS
    alignment = alignment_nbytes(skeleton, layers, quantised=quantised)
    other = vram_beside_weights(spec, plan.workload) if on_gpu else 0
    if on_gpu and plan.kv is not None:
        other += PIECES_NBYTES
    if budget is None:
        from offload.devices.cuda_driver import open_cuda

        free, _ = open_cuda(accelerator.device).memory_nbytes()
        budget = free
    try:
        made = with_vram(
            spec, plan, budget, runs_attention=on_gpu, alignment_nbytes=alignment, other_nbytes=other,
            kv_vram_nbytes=kv_vram_nbytes,
        )  # fmt: skip
    except PlanInfeasibleError as error:
        raise DoesNotFitError(str(error)) from error
    return with_prediction(spec, made, profile) if on_gpu and profile is not None else made


def profiles_for(root: Path) -> Callable[[ModelSpec], HardwareProfile | None]:
    """The machine as it was measured with the disk of this directory of stores, read once: what is returned gives it
    for models that it can predict, and None for others.
    """
    measured = cached_profile(root)

    def profile_for(spec: ModelSpec) -> HardwareProfile | None:
        if measured is None or spec.head is None or not spec.layers:
            return None
        linears = {one.format for layer in spec.layers for one in layer.linears}
        experts = {layer.layout.format for layer in spec.experts}
        return measured if measured.knows({spec.head.format, *linears, *experts}) else None

    return profile_for


def _context(request: Request, skeleton: PreTrainedModel) -> int:
    longest = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if request.context_tokens is None:
        return min(DEFAULT_CONTEXT_TOKENS, longest or DEFAULT_CONTEXT_TOKENS)
    return request.context_tokens


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The stored dtype of the largest tensor, which is what the model's weights are in."""
    largest = max(checkpoint.tensors.values(), key=lambda span: span.nbytes)
    return TORCH_DTYPES[largest.dtype]


def _any_cast(experts: Sequence[MappedExperts], compute: torch.dtype) -> bool:
    return any(TORCH_DTYPES[layer.stored_dtype] is not compute for layer in experts)


def _adopt_generation_config(skeleton: PreTrainedModel, directory: Path) -> None:
    """The checkpoint's own sampling defaults and stop tokens, as `from_pretrained` takes them."""
    if skeleton.can_generate() and (directory / "generation_config.json").is_file():
        skeleton.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
