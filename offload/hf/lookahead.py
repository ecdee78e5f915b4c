"""Routers of later layers, asked about the hidden state of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cpu_kernels.linear import linear
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.watch import TapeHook
from offload.moe.layer import ExpertsLayer
from offload.prefetcher import Prefetcher


def find_routers(model: PreTrainedModel, layers: Sequence[ExpertsLayer]) -> list[torch.nn.Module] | None:
    """The router of each experts layer, or None where they are not found.

    A router is a module of the class that transformers records router logits of, beside its experts module; where none
    is recorded, the one that has a row of weights for each expert.
    """
    recorded = getattr(model, "_can_record_outputs", None) or {}
    spec = recorded.get("router_logits")
    target = getattr(spec, "target_class", spec)
    found = []
    for layer in layers:
        block = model.get_submodule(layer.name.rpartition(".")[0])
        routers = [module for module in block.modules() if _is_router(module, target, layer)]
        if len(routers) != 1:
            return None
        found.append(routers[0])
    return found


def _is_router(module: torch.nn.Module, target: Any, layer: ExpertsLayer) -> bool:
    if isinstance(target, type):
        return isinstance(module, target)
    weight = module._parameters.get("weight")
    return module is not layer.module and weight is not None and weight.dim() == 2 and len(weight) == layer.count


def look_ahead(
    routers: Sequence[torch.nn.Module], layers: Sequence[ExpertsLayer], prefetcher: Prefetcher
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let each router's forward of one token tell the prefetcher what the next layers' routers say of its input."""
    return [
        router.register_forward_hook(_Hook(index, routers, layers, prefetcher)) for index, router in enumerate(routers)
    ]


class _Hook(TapeHook):
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
        self._next = [_logits_by(routers[index], layers[index].count) for index in range(layer + 1, last + 1)]
        self._prefetcher = prefetcher

    def __call__(self, _router: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Only one token's choice can be foreseen; of others, and of routers of another form, nothing is said."""
        if not self._prefetcher.on or not args or not isinstance(args[0], torch.Tensor):
            return
        hidden = args[0]
        if hidden.numel() != hidden.shape[-1] or not _is_usual(output, self._counts[0]):
            return
        active = output[2].reshape(-1).numpy(force=True).astype(np.int64)
        self._prefetcher.note_router(self._layer, active, partial(self._ask, args, output))

    def _ask(self, args: tuple[Any, ...], output: Any) -> tuple[Any, list[Any]] | None:
        with torch.no_grad():
            ahead = [logits(args) for logits in self._next]
        return None if any(one is None for one in ahead) else (_logits(output), ahead)


def _logits_by(router: torch.nn.Module, count: int) -> Callable[[tuple[Any, ...]], Any]:
    """A function from what a router is called with to its logits, fp32 [count], or None.

    Nearly all routers give W x and choose from it. Where this one does, as a probe shows, the product is all that is
    computed.
    """

    def by_forward(args: tuple[Any, ...]) -> Any:
        # `forward`, not a call: hooks are for the layer's own token.
        output = router.forward(*args)
        return _logits(output) if _is_usual(output, count) else None

    weight = router._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_contiguous() or len(weight) != count:
        return by_forward
    probe = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight.dtype)
    try:
        with torch.no_grad():
            expected, found = by_forward((probe,)), _logits_of(linear(probe, weight, None, kernel_pool()))
    except Exception:  # noqa: BLE001 - whatever a router of another form raises
        return by_forward
    if expected is None or not np.allclose(expected, found, rtol=0.02, atol=0.02 * float(np.abs(found).max())):
        return by_forward

    def by_product(args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        if hidden.dtype is not weight.dtype or not hidden.is_contiguous():
            return by_forward(args)
        return _logits_of(linear(hidden, weight, None, kernel_pool()))

    return by_product


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
    return _logits_of(output[0])


def _logits_of(logits: torch.Tensor) -> Any:
    return logits.reshape(-1).float().numpy(force=True)
