"""Routers of later layers, asked about the hidden state of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from offload.moe.layer import ExpertsLayer
from offload.prefetcher import Prefetcher


def find_routers(model: PreTrainedModel, layers: Sequence[ExpertsLayer]) -> list[torch.nn.Module] | None:
    """The router of each experts layer, or None where they are not found.

    A router is a module of the class that transformers records router logits of, beside its experts module.
    """
    recorded = getattr(model, "_can_record_outputs", None) or {}
    spec = recorded.get("router_logits")
    target = getattr(spec, "target_class", spec)
    if not isinstance(target, type):
        return None
    found = []
    for layer in layers:
        block = model.get_submodule(layer.name.rpartition(".")[0])
        routers = [module for module in block.modules() if isinstance(module, target)]
        if len(routers) != 1:
            return None
        found.append(routers[0])
    return found


def look_ahead(
    routers: Sequence[torch.nn.Module], layers: Sequence[ExpertsLayer], prefetcher: Prefetcher
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let each router's forward of one token tell the prefetcher what the next layers' routers say of its input."""
    return [
        router.register_forward_hook(_Hook(index, routers, layers, prefetcher)) for index, router in enumerate(routers)
    ]


class _Hook:
    """A forward hook of one router."""

    def __init__(
        self,
        layer: int,
        routers: Sequence[torch.nn.Module],
        layers: Sequence[ExpertsLayer],
        prefetcher: Prefetcher,
    ) -> None:
        last = min(layer + prefetcher.predictor.depth, len(routers) - 1)
        self._layer = layer
        self._counts = [layers[index].count for index in range(layer, last + 1)]
        self._next = [routers[index] for index in range(layer + 1, last + 1)]
        self._prefetcher = prefetcher

    def __call__(self, _router: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Only one token's choice can be foreseen; of others, and of routers of another form, nothing is said."""
        if not self._prefetcher.on or not args or not isinstance(args[0], torch.Tensor):
            return
        hidden = args[0]
        if hidden.numel() != hidden.shape[-1] or not _is_usual(output, self._counts[0]):
            return
        with torch.no_grad():
            # `forward`, not a call: hooks are for the layer's own token.
            ahead = [router.forward(*args) for router in self._next]
        if all(_is_usual(one, count) for one, count in zip(ahead, self._counts[1:], strict=True)):
            active = output[2].reshape(-1).numpy().astype(np.int64)
            self._prefetcher.foresee(self._layer, _logits(output), [_logits(one) for one in ahead], active)


def _is_usual(output: Any, count: int) -> bool:
    """(logits [1, count], weights [1, k], indices [1, k]), as nearly all routers give it."""
    return (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(part, torch.Tensor) for part in output)
        and output[0].numel() == count
        and not output[2].is_floating_point()
    )


def _logits(output: Any) -> Any:
    return output[0].reshape(-1).float().numpy()
