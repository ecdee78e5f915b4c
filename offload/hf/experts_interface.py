"""transformers' seam for experts: the implementation named "offload", and attaching layers to modules.

Everything private of transformers that experts need is named here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from offload.errors import ClosedError

IMPLEMENTATION = "offload"

_STATE = "_offload_step"

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) → [T, H]."""


def offload_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of every experts module of an offloaded model."""
    step: Step | None = self.__dict__.get(_STATE)
    if step is None:
        raise ClosedError("this model's experts are no longer here: its runtime was closed; load the model again")
    return step(hidden_states, top_k_index, top_k_weights)


def use_offload_experts(model: PreTrainedModel) -> None:
    """Dispatch the model's experts modules to `offload_experts_forward`.

    Each module gets a config of its own: the model's may be shared with other models, and is the user's.
    """
    if IMPLEMENTATION not in ExpertsInterface._global_mapping:
        ExpertsInterface.register(IMPLEMENTATION, offload_experts_forward)
    for _, module in experts_modules(model):
        config = copy.copy(module.config)
        config._experts_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]
        module.config = config


def experts_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that transformers' decorator made dispatch through the experts interface, by path, in order."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated"):
            yield name, module


def remove_expert_weights(module: torch.nn.Module) -> None:
    """Take the parameters off an experts module; transformers must not initialise what is not there."""
    for name in list(module._parameters):
        del module._parameters[name]
    module._is_hf_initialized = True  # type: ignore[assignment]


def attach_step(module: torch.nn.Module, step: Step) -> None:
    """Make the module's forward call `step`."""
    module.__dict__[_STATE] = step


def detach_step(module: torch.nn.Module) -> None:
    """Make the module's forward raise ClosedError."""
    module.__dict__.pop(_STATE, None)
