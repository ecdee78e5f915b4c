"""Seeing whether modules whose calls are left out are as they were: their weights in place, nobody listening."""

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
        self.also_hooks_of(modules)

    def also_hooks_of(self, modules: Iterable[nn.Module]) -> None:
        """Modules of which only the hooks matter."""
        self._hooks += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def finds_nothing(self) -> bool:
        """Whether there are no hooks, the weights lie where they lay, and nobody has given a module another forward."""
        if any(self._hooks):
            return False
        for tensors, name, tensor, address in self._weights:
            if tensors.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return not any("forward" in state for state in self._states)
