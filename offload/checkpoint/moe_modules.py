"""Finding the experts modules of a transformers model, and refusing those that are laid out otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from offload.checkpoint.hf_mapping import ExpertsFlags, experts_flags, is_experts_module, parameter_shapes
from offload.errors import UnsupportedModelError

_EXPERTS_CLASS = re.compile(r"(?<!Shared)Experts$")
_BLOCK_CLASS = re.compile(r"(MoE|Moe|MoeBlock|SparseMLP)$")


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of the model.

    Attributes:
        path: in the model.
        flags: order of its parameters.
        hidden: H.
        intermediate: I.
        count: experts E.
        shapes: of its parameters, by name in the module, the experts' axis in front.
    """

    path: str
    flags: ExpertsFlags
    hidden: int
    intermediate: int
    count: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def first_projection(self) -> str:
        """Name of the parameter that reads the expert's input."""
        return "gate_up_proj" if self.flags.has_gate else "up_proj"


def find_experts(skeleton: PreTrainedModel) -> list[ExpertsModule]:
    """All experts modules, in the order of the model's modules; none of a dense model.

    Raises:
        UnsupportedModelError: some routed experts are not in the form that transformers dispatches.
    """
    refuse_foreign_experts(skeleton)
    return [_describe(path, module) for path, module in _decorated(skeleton)]


def refuse_foreign_experts(model: PreTrainedModel) -> None:
    """See that a model without experts modules has no experts.

    Raises:
        UnsupportedModelError: some routed experts are not in the form that transformers dispatches.
    """
    for path, module in model.named_modules():
        if _is_foreign(module):
            raise UnsupportedModelError(
                f"{type(model).__name__}, module {path!r}: expected experts that transformers dispatches "
                f"(@use_experts_implementation), found {type(module).__name__}. Fix: load this model with "
                "transformers; its experts need an adapter that this version does not have."
            )


def _decorated(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in root.named_modules() if is_experts_module(module))


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module holds routed experts out of the experts interface's reach."""
    if is_experts_module(module):
        return False
    name = type(module).__name__
    if _EXPERTS_CLASS.search(name):
        return True
    without = next(_decorated(module), None) is None
    lists_experts = isinstance(getattr(module, "experts", None), nn.ModuleList | nn.ModuleDict)
    return without and (lists_experts or _BLOCK_CLASS.search(name) is not None)


def _describe(path: str, module: nn.Module) -> ExpertsModule:
    flags = experts_flags(module)
    shapes = parameter_shapes(module)
    name = f"{type(module).__name__} at {path!r}"
    if flags.has_post_expert_norm:
        raise UnsupportedModelError(
            f"{name}: expected experts of two or three projections, found a norm after each expert. Fix: load this "
            "model with transformers."
        )
    first = "gate_up_proj" if flags.has_gate else "up_proj"
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if flags.has_bias else set())
    if set(shapes) != wanted:
        found = ", ".join(sorted(shapes)) or "none"
        raise UnsupportedModelError(
            f"{name}: expected the parameters {', '.join(sorted(wanted))}, found {found}. Fix: load this model with "
            "transformers."
        )
    count, *down = shapes["down_proj"]
    hidden, intermediate = reversed(down) if flags.is_transposed else down
    rows = 2 * intermediate if flags.has_gate else intermediate
    matrix = (hidden, rows) if flags.is_transposed else (rows, hidden)
    expected = {first: (count, *matrix), f"{first}_bias": (count, rows), "down_proj_bias": (count, hidden)}
    for parameter, shape in expected.items():
        if parameter in wanted and shapes[parameter] != shape:
            raise UnsupportedModelError(
                f"{name}, {parameter}: expected {list(shape)} beside down_proj {list(shapes['down_proj'])}, found "
                f"{list(shapes[parameter])}. Fix: load this model with transformers."
            )
    return ExpertsModule(path, flags, hidden, intermediate, count, shapes)
