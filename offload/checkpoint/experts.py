"""From checkpoint keys to experts: which bytes of which file make each component of each expert.

transformers' own conversion mapping decides where a key goes, so the experts are those that `from_pretrained` would
build. Nothing is read or materialised here but shapes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.encoded import pick_component
from offload.checkpoint.gather import StoredParameter, gather, missing_component
from offload.checkpoint.hf_mapping import MappedKey, map_keys
from offload.checkpoint.mismatch import mismatch
from offload.checkpoint.moe_modules import ExpertsModule, find_experts
from offload.checkpoint.quantised import refuse_quantised_keys
from offload.checkpoint.views import Cut, UnequalShapesError, UnknownOperationError, View, apply_operations, cut
from offload.errors import UnsupportedModelError
from placement.tensors import ComponentSource, EncodedSpan, TensorSpan


@dataclass(frozen=True)
class MappedExperts:
    """The experts of one MoE layer.

    Attributes:
        module: path of the experts module in the model.
        has_gate: False for experts with an up projection only.
        has_bias: True where every projection has a bias.
        hidden: H.
        intermediate: I.
        count: experts.
        sources: per expert, the sources of its components by name, in the order of the bundle.
        stored_dtype: the safetensors tag of all of them.
    """

    module: str
    has_gate: bool
    has_bias: bool
    hidden: int
    intermediate: int
    count: int
    sources: tuple[dict[str, ComponentSource], ...]
    stored_dtype: str


@dataclass(frozen=True)
class CheckpointMap:
    """A checkpoint, divided; every tensor is in exactly one part.

    Attributes:
        experts: the MoE layers in the order of the model's modules.
        dense: tensors that make the other parameters and buffers, by the checkpoint's key.
        renamed: the key in `dense` of every parameter and buffer that is one stored tensor as it is, by its name.
        unused: tensors that the model has no place for, such as layers for multi-token prediction.
    """

    experts: tuple[MappedExperts, ...]
    dense: dict[str, TensorSpan]
    unused: dict[str, TensorSpan] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def map_checkpoint(skeleton: PreTrainedModel, tensors: Mapping[str, TensorSpan]) -> CheckpointMap:
    """Divide a checkpoint's tensors into experts and the rest.

    Args:
        skeleton: the model with all of its parameters in place, on the meta device.
        tensors: the checkpoint's tensors by key; of a quantised one as `decoded_tensors` gives them.

    Raises:
        UnsupportedModelError: tensors of a quantisation that are not decoded, experts or a conversion of an unknown
            form.
        CheckpointError: an expert's tensor is missing, duplicated, or not of the shape or dtype that it must have.
    """
    modules = find_experts(skeleton)
    by_target: dict[str, list[MappedKey]] = defaultdict(list)
    parameters = {f"{module.path}.{name}" for module in modules for name in module.shapes}
    dense: dict[str, TensorSpan] = {}
    unused: dict[str, TensorSpan] = {}
    renamed: dict[str, str] = {}
    for key in map_keys(skeleton, tensors):
        if key.target in parameters:
            by_target[key.target].append(key)
        else:
            (dense if key.known else unused)[key.key] = tensors[key.key]
            if key.known and key.conversion is None:
                renamed[key.target] = key.key
            if not key.known:
                _refuse_stray(key, modules, tensors[key.key])
    experts = tuple(_map_module(module, by_target, tensors) for module in modules)
    return CheckpointMap(experts, dense, unused, renamed)


def read_component(checkpoint: Checkpoint, source: ComponentSource, *, once: bool = False) -> torch.Tensor:
    """Read one component of one expert.

    Returns:
        a contiguous tensor on the CPU, in the dtype of its span and the bundle's orientation (rows are outputs).

    Raises:
        CheckpointChangedError, StorageError: see `Checkpoint.read`.
    """
    return pick_component(checkpoint.read(source.span, once=once), source).contiguous()


def _refuse_stray(key: MappedKey, modules: Sequence[ExpertsModule], span: TensorSpan) -> None:
    refuse_quantised_keys([key.key])
    for module in modules:
        if key.target.startswith(f"{module.path}."):
            raise mismatch(
                span.file,
                tensor=key.key,
                expected=f"one of {', '.join(module.shapes)} of the experts at {module.path!r}",
                found=f"{key.target!r}, which the model does not have",
            )


def _map_module(
    module: ExpertsModule, by_target: Mapping[str, Sequence[MappedKey]], tensors: Mapping[str, TensorSpan]
) -> MappedExperts:
    sources: list[dict[str, ComponentSource]] = [{} for _ in range(module.count)]
    dtypes: dict[str, str] = {}
    for parameter, shape in _in_bundle_order(module):
        target = f"{module.path}.{parameter}"
        if target not in by_target:
            raise missing_component(target, tensors)
        stored = gather(target, by_target[target], tensors, module.count)
        view = _view(target, stored, shape[1:])
        first = stored.slots[0][0]
        dtypes[first.key] = first.span.dtype
        if len(set(dtypes.values())) > 1:
            other = next(iter(dtypes))
            expected = f"dtype {dtypes[other]}, as in {other!r}"
            raise mismatch(first.span.file, tensor=first.key, expected=expected, found=first.span.dtype)
        for component, picked in _components(module, parameter).items():
            found = _cut(target, stored, view, _out_axis(module, parameter), picked)
            for expert in range(module.count):
                sources[expert][component] = _source(stored.slots[found.slot][expert].span, found)
    flags = module.flags
    return MappedExperts(
        module=module.path,
        has_gate=flags.has_gate,
        has_bias=flags.has_bias,
        hidden=module.hidden,
        intermediate=module.intermediate,
        count=module.count,
        sources=tuple(sources),
        stored_dtype=next(iter(dtypes.values())),
    )


def _in_bundle_order(module: ExpertsModule) -> list[tuple[str, tuple[int, ...]]]:
    names = [module.first_projection, "down_proj"]
    names += [f"{name}_bias" for name in names] if module.flags.has_bias else []
    return [(name, module.shapes[name]) for name in names]


def _components(module: ExpertsModule, parameter: str) -> dict[str, slice]:
    """The components that a parameter holds, each as entries of its axis of outputs."""
    suffix = "_bias" if parameter.endswith("_bias") else ""
    if parameter.startswith("down_proj"):
        return {f"down{suffix}": slice(None)}
    if not module.flags.has_gate:
        return {f"up{suffix}": slice(None)}
    half = module.intermediate
    if module.flags.is_concatenated:
        return {f"gate{suffix}": slice(0, half), f"up{suffix}": slice(half, 2 * half)}
    return {f"gate{suffix}": slice(0, None, 2), f"up{suffix}": slice(1, None, 2)}


def _out_axis(module: ExpertsModule, parameter: str) -> int:
    return 1 if module.flags.is_transposed and not parameter.endswith("_bias") else 0


def _view(target: str, stored: StoredParameter, expected: tuple[int, ...]) -> View:
    """One expert's share of the parameter; the same for all experts of the layer."""
    views = [View.of_source(number, slot[0].span.shape) for number, slot in enumerate(stored.slots)]
    first = stored.slots[0][0]
    try:
        view = apply_operations(views, stored.operations, expected)
    except UnknownOperationError as error:
        raise _unknown(target, stored, error) from error
    except UnequalShapesError as error:
        keys = " and ".join(repr(slot[0].key) for slot in stored.slots)
        raise mismatch(first.span.file, tensor=first.key, expected=f"shapes that join {keys}", found=f"{error}") from (
            error
        )
    if view.shape != expected:
        raise mismatch(
            first.span.file,
            tensor=first.key,
            expected=f"an expert of shape {list(expected)} for {target!r}",
            found=f"{list(view.shape)}",
        )
    return view


def _cut(target: str, stored: StoredParameter, view: View, out_axis: int, picked: slice) -> Cut:
    try:
        return cut(view, out_axis, picked, [slot[0].span.shape for slot in stored.slots])
    except UnknownOperationError as error:
        raise _unknown(target, stored, error) from error


def _unknown(target: str, stored: StoredParameter, error: UnknownOperationError) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{target}: expected a conversion that only moves rows and columns, found {error} for {stored.pattern!r}. "
        "Fix: load this model with transformers, or save it again with `save_pretrained` from there."
    )


def _source(span: TensorSpan, found: Cut) -> ComponentSource:
    if found.axis != 0 or found.step != 1 or isinstance(span, EncodedSpan):
        return ComponentSource(span, found.axis, found.first, found.step, found.count, found.transposed)
    if found.count == span.shape[0]:
        return ComponentSource(span, 0, 0, 1, found.count, found.transposed)
    row = span.nbytes // span.shape[0]
    rows = TensorSpan(
        span.file, span.offset + found.first * row, found.count * row, span.dtype, (found.count, *span.shape[1:])
    )
    return ComponentSource(rows, 0, 0, 1, found.count, found.transposed)
