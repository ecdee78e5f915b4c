"""Running a module's own code with stand-ins for its children, to see what it does with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


class Given(nn.Module):
    """Returns what it was made with and remembers what it was called with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output."""
        self.calls.append((args, kwargs))
        return self.output


def with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module, of its plain class, with other children; it shares everything else."""
    stand_in = copy.copy(module)
    stand_in._modules = {**module._modules, **children}
    return stand_in
