"""Everything that this package takes from transformers' private loading code.

What comes out is neutral: which parameter a checkpoint key ends in, and by which operations. `from_pretrained` builds
the same parameters from the same keys, because the same functions rename them.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from offload.errors import UnsupportedModelError

_PRIVATE = {
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": (
        "WeightConverter",
        "WeightRenaming",
        "dot_natural_key",
        "rename_source_key",
    ),
}

_OPERATION_ARGUMENTS = {
    "MergeModulelist": ("dim",),
    "Concatenate": ("dim",),
    "Interleave": ("dim", "inverse"),
    "Transpose": ("dim0", "dim1", "check_dims"),
}


@dataclass(frozen=True)
class Operation:
    """One step of a conversion: the name of transformers' class and the arguments that matter."""

    name: str
    arguments: dict[str, int]


@dataclass(frozen=True)
class Conversion:
    """How one parameter is made of stored tensors.

    Attributes:
        sources: the key patterns, in the order in which the operations take them; `*` stands for an expert id.
        operations: applied in order.
        targets: how many parameters come out.
    """

    sources: tuple[str, ...]
    operations: tuple[Operation, ...]
    targets: int


@dataclass(frozen=True)
class MappedKey:
    """Where one checkpoint key goes.

    Attributes:
        key: as the checkpoint has it.
        target: name of the parameter or buffer; the first one where a conversion makes several.
        known: True if the model has `target`.
        source: the pattern of `conversion` that matched; None for a key that is only renamed.
        conversion: None for a key that is only renamed.
        expert: what `*` stood for; None where `source` has none.
    """

    key: str
    target: str
    known: bool
    source: str | None = None
    conversion: Conversion | None = None
    expert: int | None = None


def map_keys(skeleton: PreTrainedModel, keys: Iterable[str]) -> list[MappedKey]:
    """Map checkpoint keys to the parameters of a model, in the order in which transformers would load them.

    Args:
        skeleton: the model, all of its parameters in place (on the meta device or not).
        keys: the checkpoint's keys.

    Raises:
        UnsupportedModelError: the installed transformers lacks a function that this needs.
    """
    private = _private_names()
    mapping = copy.deepcopy(private["get_model_conversion_mapping"](skeleton))
    renamings = [entry for entry in mapping if isinstance(entry, private["WeightRenaming"])]
    converters = [entry for entry in mapping if isinstance(entry, private["WeightConverter"])]
    # A pattern that two converters share belongs to the later one, as in transformers.
    conversions = {source: _conversion(converter) for converter in converters for source in converter.source_patterns}
    state = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    rename: Callable[..., tuple[str, str | None]] = private["rename_source_key"]
    siblings = _Siblings()
    mapped = []
    for key in sorted(keys, key=private["dot_natural_key"]):
        known = siblings.find(key)
        if known is not None:
            mapped.append(known)
            continue
        target, source = rename(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, source = rename(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if source is None:
            mapped.append(MappedKey(key, target, target in state))
            continue
        expert = _expert_id(source, _renamed(key, renamings)) if "*" in source else None
        mapped.append(MappedKey(key, target, target in state, source, conversions[source], expert))
        siblings.add(mapped[-1])
    return mapped


class _Siblings:
    """Keys that differ in the expert id alone go to the same parameter.

    transformers matches each key against every pattern of its mapping; a large model has a hundred thousand keys. Once
    two experts of a layer agree, the others of that layer are not matched any more.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], MappedKey] = {}
        self._settled: dict[tuple[str, str], MappedKey] = {}

    def add(self, mapped: MappedKey) -> None:
        """Learn from a key that was matched."""
        around, number = _around_last_number(mapped.key)
        if mapped.expert is None or number != str(mapped.expert):
            return
        first = self._first.setdefault(around, mapped)
        if first is not mapped and replace(mapped, key=first.key, expert=first.expert) == first:
            self._settled[around] = mapped

    def find(self, key: str) -> MappedKey | None:
        """Where the key goes, if two of its siblings went the same way."""
        around, number = _around_last_number(key)
        sibling = self._settled.get(around)
        return None if sibling is None else replace(sibling, key=key, expert=int(number))


def _around_last_number(key: str) -> tuple[tuple[str, str], str]:
    """The text before and after the last part of a dotted name that is a number, and that number."""
    parts = key.split(".")
    for index in range(len(parts) - 1, -1, -1):
        if parts[index].isdecimal():
            return (".".join(parts[:index]), ".".join(parts[index + 1 :])), parts[index]
    return (key, ""), ""


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    return hasattr(module, "is_concatenated")


@dataclass(frozen=True)
class ExpertsFlags:
    """How an experts module orders its parameters; the names are those of transformers' decorator."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool


def experts_flags(module: nn.Module) -> ExpertsFlags:
    """The flags of a module for which `is_experts_module` holds."""
    return ExpertsFlags(
        has_gate=_flag(module, "has_gate", default=True),
        has_bias=_flag(module, "has_bias", default=False),
        is_transposed=_flag(module, "is_transposed", default=False),
        is_concatenated=_flag(module, "is_concatenated", default=True),
        has_post_expert_norm=_flag(module, "has_post_expert_norm", default=False),
    )


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and persistent buffers below a module, by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def _flag(module: nn.Module, name: str, *, default: bool) -> bool:
    return bool(getattr(module, name, default))


def _private_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for module_name, wanted in _PRIVATE.items():
        try:
            module = importlib.import_module(module_name)
            names.update({name: getattr(module, name) for name in wanted})
        except (ImportError, AttributeError) as error:
            raise UnsupportedModelError(
                f"transformers {transformers_version}: expected {', '.join(wanted)} in {module_name}, found: {error}. "
                "Fix: install a transformers release that this version supports (transformers>=5.17)."
            ) from error
    return names


def _conversion(converter: Any) -> Conversion:
    operations = tuple(_operation(operation) for operation in converter.operations)
    return Conversion(tuple(converter.source_patterns), operations, len(converter.target_patterns))


def _operation(operation: Any) -> Operation:
    name = type(operation).__name__
    wanted = _OPERATION_ARGUMENTS.get(name, ())
    return Operation(name, {argument: int(getattr(operation, argument, 0)) for argument in wanted})


def _renamed(key: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _expert_id(source: str, renamed_key: str) -> int | None:
    pattern = source.replace("*.", r"(?P<expert>.*)\.", 1).replace("*.", r".*\.")
    found = re.search(pattern, renamed_key)
    if found is None or not found["expert"].isdecimal():
        return None
    return int(found["expert"])
