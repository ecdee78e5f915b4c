"""Seeing whether modules whose calls are left out are as they were: weights and parts in place, nobody listening.

Asked before every pass, when the weights of the one before have pushed all of this out of the caches: so it reads as
few places as will do, in loops without bytecode, and asks for all of them at once before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from cpu_kernels.ask_ahead import ask_ahead
from cpu_kernels.compiling.compiler import direct
from offload.hf.fused.object_lines import lines_of


class TapeHook(ABC):
    """A forward hook of a router that whoever leaves the router's own call out tells: it need not keep him from it."""

    def routed(
        self, router: nn.Module, hidden: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """The router's call was left out; this is what it would have been given, and what it would have returned.

        Args:
            router: the module.
            hidden: [tokens, hidden]. It and the others are written over when the layer is done.
            logits: [tokens, experts].
            weights: [tokens, top_k].
            ids: int64 [tokens, top_k].
        """
        self(router, (hidden.clone(),), (logits.clone(), weights.clone(), ids.clone()))

    @abstractmethod
    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The router was called."""


class Watch:
    """Some modules as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._held = _Held()
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                self._held.add(tensors)
        self._addresses = array("q", map(torch.Tensor.data_ptr, self._held.values))
        self._hooks: list[dict[int, Any]] = [
            torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
        ]  # fmt: skip
        self._handles = -1
        self._states = [module.__dict__ for module in modules]
        self._attributes = -1
        self._children = _Held()
        self._lines: npt.NDArray[np.int64] | None = None
        self._ask = direct(ask_ahead)
        self.also_hooks_of(modules)
        self.also_children_of(modules)

    def also_hooks_of(self, modules: Iterable[nn.Module]) -> None:
        """Modules that nobody may listen to either."""
        self._hooks += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._handles = -1

    def also_children_of(self, modules: Iterable[nn.Module], *, only: str | None = None) -> None:
        """Modules of which nobody may replace the parts, or one part, as adapters do."""
        for module in modules:
            self._children.add(module._modules, only)
        self._lines = None

    def aliases(self) -> list[torch.Tensor]:
        """All weights' memory as it is now; it stays allocated as long as these are kept."""
        return [tensor.detach() for tensor in self._held.values]

    def finds_nothing(self) -> bool:
        """Whether there are no hooks, weights lie where they lay, and nobody has replaced a module or its forward."""
        if self._lines is None:
            self._lines = lines_of((*self._held.dicts, *self._children.dicts), self._held.values, self._states)
        self._ask(self._lines)
        return (
            self._nobody_listens()
            and self._children.is_as_it_was()
            and self._held.is_as_it_was()
            and array("q", map(torch.Tensor.data_ptr, self._held.values)) == self._addresses
            and self._no_forward_is_another()
        )

    def _nobody_listens(self) -> bool:
        # Whoever registers a hook takes the next handle.
        if self._handles != RemovableHandle.next_id:
            if any(not isinstance(hook, TapeHook) for hooks in self._hooks for hook in hooks.values()):
                return False
            self._handles = RemovableHandle.next_id
        return True

    def _no_forward_is_another(self) -> bool:
        attributes = sum(map(len, self._states))
        if self._attributes != attributes:
            if any("forward" in state for state in self._states):
                return False
            self._attributes = attributes
        return True


class _Held:
    """What dicts hold under some names, as it is now.

    Attributes:
        values: that are not None.
        dicts: that hold each.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.dicts: list[dict[str, Any]] = []
        self._names: list[str] = []

    def add(self, holder: dict[str, Any], only: str | None = None) -> None:
        """What a dict holds now, or holds under one name."""
        for name, value in holder.items():
            if value is not None and only in (None, name):
                self.values.append(value)
                self.dicts.append(holder)
                self._names.append(name)

    def is_as_it_was(self) -> bool:
        """Whether the dicts hold the same."""
        return all(map(is_, map(dict.get, self.dicts, self._names), self.values))
