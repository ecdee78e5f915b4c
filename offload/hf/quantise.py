"""Which of a model's linear layers are quantised, what they take, and putting them in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from formats.packed import TILE_ROWS, MatrixLayout, round_up
from offload.checkpoint.encoded import EncodedMatrix
from offload.devices.host import HostSlab
from offload.errors import CheckpointError, InvalidArgumentError
from offload.hf.experts_interface import experts_modules
from offload.hf.quantised_linear import QuantisedLinear
from offload.quantisation import Quantisation

_ROUTING = re.compile(r"(^|\.)([a-z0-9_]*router|[a-z0-9_]*gate)(\.|$)")
"""Modules that decide or weight: `gate`, `router`, `shared_expert_gate` and what is below them, not `gate_proj`."""

_READ_FROM_OUTSIDE = re.compile(r"(^|\.)dt_proj$")
"""Layers whose weight the module around them multiplies itself (Mamba)."""

_ALIGNMENT_BYTES = 64


def linears_to_quantise(model: PreTrainedModel, quantisation: Quantisation) -> dict[str, str]:
    """The format of every linear layer that is quantised, by path, in the order of modules.

    Routers and gates stay as they are, and so does what has fewer outputs than a tile has rows: a few bytes, which
    decide much.

    Raises:
        InvalidArgumentError: formats are asked for of parts that the model has not.
    """
    head = model.get_output_embeddings()
    _check_parts(model, head, quantisation)
    chosen = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        format = quantisation.lm_head if module is head else quantisation.dense
        if format is None or (module is not head and _stays(name, module)):
            continue
        chosen[name] = format
    return chosen


def _stays(name: str, linear: nn.Linear) -> bool:
    return linear.out_features < TILE_ROWS or any(kind.search(name) for kind in (_ROUTING, _READ_FROM_OUTSIDE))


def _check_parts(model: PreTrainedModel, head: nn.Module | None, quantisation: Quantisation) -> None:
    """A format that would change nothing is a mistake, except where one format was asked for the whole model."""
    name = type(model).__name__
    format, alone = quantisation.experts, not (quantisation.dense or quantisation.lm_head)
    if format and alone and next(experts_modules(model), None) is None:
        raise InvalidArgumentError(
            f'quant={{"experts": "{format}"}}: {name} is a dense model without experts; give quant="{format}" or '
            f'{{"dense": "{format}"}}'
        )
    matrices = [module for module in model.modules() if module is not head and _has_matrix(module)]
    if quantisation.dense and not any(type(module) is nn.Linear for module in matrices):
        found = ", ".join(sorted({type(module).__name__ for module in matrices})) or "none"
        raise InvalidArgumentError(
            f"quant: {quantisation.dense!r} for the dense layers of {name}: expected layers of torch's class Linear, "
            f"found {found}. Fix: load it without; its output layer alone can be packed, as with "
            'quant={"lm_head": "int8"}'
        )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def quantised_nbytes(model: PreTrainedModel, formats: Mapping[str, str]) -> dict[str, int]:
    """Bytes of each quantised layer's codes, scales and bias, by path."""
    sizes = {}
    for name, format in formats.items():
        linear = _linear(model, name)
        bias = 0 if linear.bias is None else 4 * linear.out_features
        sizes[name] = MatrixLayout(linear.out_features, linear.in_features, format).nbytes + bias
    return sizes


def parameters_of(model: PreTrainedModel, name: str) -> list[str]:
    """Names of a linear layer's parameters."""
    return [f"{name}.{own}" for own, _ in model.get_submodule(name).named_parameters()]


def readable_alone(model: PreTrainedModel, formats: Mapping[str, str], stored: Iterable[str]) -> list[str]:
    """The layers whose parameters are each one tensor of the checkpoint and belong to no other module.

    Args:
        model: skeleton.
        formats: by path of the layers.
        stored: parameters that the checkpoint has as they are.
    """
    own = set(stored) - set(model.all_tied_weights_keys) - set(model.all_tied_weights_keys.values())
    return [name for name in formats if own.issuperset(parameters_of(model, name))]


@dataclass(frozen=True)
class TakenOut:
    """A layer that is not in its model for the time being.

    Attributes:
        name: its path.
        format: what it is to be packed in.
        shape: (N, K).
        has_bias: whether it has one.
    """

    name: str
    format: str
    shape: tuple[int, int]
    has_bias: bool

    @property
    def parameters(self) -> list[str]:
        """Names of its parameters."""
        return [f"{self.name}.weight", *([f"{self.name}.bias"] if self.has_bias else [])]


def take_out(model: PreTrainedModel, formats: Mapping[str, str], names: Iterable[str]) -> list[TakenOut]:
    """Leave places without parameters, so that transformers loads the others and misses nothing."""
    taken = []
    for name in names:
        linear = _linear(model, name)
        shape = (linear.out_features, linear.in_features)
        taken.append(TakenOut(name, formats[name], shape, linear.bias is not None))
        model.set_submodule(name, _place(has_bias=linear.bias is not None))
    return taken


def _place(*, has_bias: bool) -> nn.Module:
    """A module without parameters, whose weights, for those who initialise them from outside, are initialised."""
    place = nn.Identity()
    place._is_hf_initialized = True  # type: ignore[assignment]
    done = torch.empty(0, device="meta")
    done._is_hf_initialized = True  # type: ignore[attr-defined]
    place.weight, place.bias = done, done if has_bias else None  # type: ignore[assignment]
    return place


def put_back(
    model: PreTrainedModel, taken: Sequence[TakenOut], read: Callable[[str], torch.Tensor | EncodedMatrix]
) -> None:
    """Read, pack and put in place one layer after the other.

    Args:
        model: with the places that `take_out` left.
        taken: what it gave.
        read: the tensor of a parameter, or its codes and scales.

    Raises:
        CheckpointError: a weight is of another shape or not finite.
    """
    memory = _memory_of([MatrixLayout(*layer.shape, layer.format) for layer in taken])
    for layer in taken:
        weight = read(f"{layer.name}.weight")
        bias = read(f"{layer.name}.bias") if layer.has_bias else None
        if isinstance(bias, EncodedMatrix):
            raise CheckpointError(
                f"{layer.name}.bias: expected a bias of {layer.shape[0]} floats, found codes of a matrix"
            )
        shapes = [tuple(weight.shape), *([] if bias is None else [tuple(bias.shape)])]
        expected = [layer.shape, *([] if bias is None else [layer.shape[:1]])]
        if shapes != expected:
            raise CheckpointError(f"{layer.name}: expected weights of shape {expected}, found {shapes}")
        _put(model, layer.name, weight, bias, layer.format, next(memory))


def quantise_loaded(model: PreTrainedModel, formats: Mapping[str, str]) -> None:
    """Replace layers whose weights are in memory, one after the other; weights that others share stay.

    Raises:
        CheckpointError: a weight is not finite.
    """
    linears = {name: _linear(model, name) for name in formats}
    memory = _memory_of(
        [MatrixLayout(linears[name].out_features, linears[name].in_features, formats[name]) for name in formats]
    )
    for name, format in formats.items():
        linear = linears.pop(name)
        _put(model, name, linear.weight, linear.bias, format, next(memory))


def _memory_of(layouts: Sequence[MatrixLayout]) -> Iterator[torch.Tensor]:
    """Memory of each matrix, uint8 [nbytes], one after the other in one slab.

    In huge pages, as experts lie: codes of 4 bits are read up to a tenth slower in small ones. Most matrices alone
    would fill none.
    """
    sizes = [round_up(layout.nbytes, _ALIGNMENT_BYTES) for layout in layouts]
    slab = HostSlab(sum(sizes)).tensor()
    at = 0
    for layout, size in zip(layouts, sizes, strict=True):
        yield slab[at : at + layout.nbytes]
        at += size


def _put(
    model: PreTrainedModel,
    name: str,
    weight: torch.Tensor | EncodedMatrix,
    bias: torch.Tensor | None,
    format: str,
    memory: torch.Tensor,
) -> None:
    model.set_submodule(name, QuantisedLinear(weight, bias, format, name, memory).eval())


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: expected a linear layer, found {type(linear).__name__}")
    return linear
