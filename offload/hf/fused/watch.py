"""Seeing whether modules whose calls are left out are as they were: weights and parts in place, nobody listening."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module


class Watch:
    """Some modules as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._weights = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._hooks = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._states = [module.__dict__ for module in modules]
        self._children: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self.also_hooks_of(modules)
        self.also_children_of(modules)

    def also_hooks_of(self, modules: Iterable[nn.Module]) -> None:
        """Modules that nobody may listen to either."""
        self._hooks += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def also_children_of(self, modules: Iterable[nn.Module], *, only: str | None = None) -> None:
        """Modules of which nobody may replace the parts, or one part, as adapters do."""
        self._children += [
            (module._modules, name, child)
            for module in modules
            for name, child in module._modules.items()
            if child is not None and only in (None, name)
        ]

    def finds_nothing(self) -> bool:
        """Whether there are no hooks, weights lie where they lay, and nobody has replaced a module or its forward."""
        if any(self._hooks):
            return False
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for tensors, name, tensor, address in self._weights:
            if tensors.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return not any("forward" in state for state in self._states)
