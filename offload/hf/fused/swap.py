"""Giving a module another forward: its class becomes a subclass of its class that adds no state."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch

STACK = "_offload_stack"
"""Where decoder layers and decoders keep what runs in their place; the one thing that their copies leave behind."""


class Fused(torch.nn.Module):
    """Mixed into the classes of modules that kernels compute. Copied or pickled, a module is of its plain class."""

    plain: ClassVar[type[torch.nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != STACK}
        return self.plain.__new__, (self.plain,), state


def swap(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Let `forward` be the module's; what it was is `self.plain.forward`."""
    module.__class__ = _subclass(plain_class(module), forward)  # type: ignore[arg-type]  # classes are hashable


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that a module has without kernels."""
    return module.plain if isinstance(module, Fused) else type(module)


@cache
def _subclass(plain: type[torch.nn.Module], forward: Callable[..., Any]) -> type[torch.nn.Module]:
    # transformers looks up what a model's outputs can be by its class's module and qualified name.
    members = {
        "plain": plain, "forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }  # fmt: skip
    return type(f"Fused{plain.__name__}", (Fused, plain), members)


def rebind(function: Any, replacements: Mapping[str, Any]) -> types.FunctionType | None:
    """The same function with some of the globals that it names replaced; those of its module stay.

    None where it is not a plain function or names none of them.
    """
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return None
    if not set(replacements) & set(function.__code__.co_names):
        return None
    scope = {**function.__globals__, **replacements}
    bound = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
    bound.__qualname__, bound.__doc__ = function.__qualname__, function.__doc__
    bound.__annotations__ = function.__annotations__
    return bound
