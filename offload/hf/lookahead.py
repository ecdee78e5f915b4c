"""Routers of later layers, asked about the hidden state of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from cpu_kernels.linear import Products
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.watch import TapeHook
from offload.moe.layer import ExpertsLayer
from offload.prefetcher import Ask, Prefetcher


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
        self._next = [routers[index] for index in range(layer + 1, last + 1)]
        # The layer's own too: cheaper than to take them from the tape's logits, with weights that have just been read.
        self._products = _products_of(routers[layer : last + 1], self._counts)
        self._prefetcher = prefetcher
        self._taped: tuple[torch.Tensor, npt.NDArray[np.int64], Ask] | None = None

    def __call__(self, _router: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Only one token's choice can be foreseen; of others, and of routers of another form, nothing is said."""
        if not self._prefetcher.on or not args or not isinstance(args[0], torch.Tensor):
            return
        hidden = args[0]
        if hidden.numel() != hidden.shape[-1] or not _is_usual(output, self._counts[0]):
            return
        active = output[2].reshape(-1).numpy(force=True).astype(np.int64)
        self._prefetcher.note_router(self._layer, active, partial(self._ask, args, output[0]))

    def routed(
        self,
        router: torch.nn.Module,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        """The same without copies: what was foreseen is asked for before the layer is done."""
        if self._products is None:
            super().routed(router, hidden, logits, weights, ids)
        elif len(logits) == 1 and self._prefetcher.on:
            if self._taped is None or self._taped[0] is not ids:
                # A tape tells of the same memory each time.
                self._taped = ids, ids.view(-1).numpy(), partial(self._ask, (hidden,), logits)
            self._prefetcher.note_router(self._layer, *self._taped[1:])

    def _ask(self, args: tuple[Any, ...], logits: torch.Tensor) -> npt.NDArray[np.float32] | None:
        products, hidden, counts = self._products, args[0], self._counts
        if products is not None and hidden.dtype is products.dtype and hidden.is_contiguous() and hidden.is_cpu:
            products.compute(hidden, kernel_pool())
            return products.found
        said = np.zeros((len(counts), max(counts)), np.float32)
        said[0, : counts[0]] = _logits_of(logits)
        with torch.no_grad():
            for place, (router, count) in enumerate(zip(self._next, counts[1:], strict=True), start=1):
                found = _by_forward(router, count, args)
                if found is None:
                    return None
                said[place, :count] = found
        return said


def _by_forward(router: torch.nn.Module, count: int, args: tuple[Any, ...]) -> Any:
    """What a router that is called with some arguments gives as logits, fp32 [count], or None."""
    # `forward`, not a call: hooks are for the layer's own token.
    output = router.forward(*args)
    return _logits_of(output[0]) if _is_usual(output, count) else None


def _products_of(routers: Sequence[torch.nn.Module], counts: Sequence[int]) -> Products | None:
    """The products that give the logits of some routers; None where one computes something else, or there are none.

    Nearly all routers give W x and choose from it. Where all of these do, as a probe shows, only products are computed.
    """
    weights = [router._parameters.get("weight") for router in routers]
    held = [weight for weight in weights if weight is not None and weight.dim() == 2]
    if len(held) < len(routers) or any(len(weight) != count for weight, count in zip(held, counts, strict=True)):
        return None
    try:
        products = Products(held)
        probe = torch.randn(1, products.columns, generator=torch.Generator().manual_seed(0), device="cpu")
        probe = probe.to(products.dtype)
        with torch.no_grad():
            expected = [_by_forward(router, count, (probe,)) for router, count in zip(routers, counts, strict=True)]
        products.compute(probe, kernel_pool())
    except Exception:  # noqa: BLE001 - whatever a router of another form raises
        return None
    same = all(
        right is not None and np.allclose(right, line[: len(right)], rtol=0.02, atol=0.02 * float(np.abs(line).max()))
        for right, line in zip(expected, products.found, strict=True)
    )
    return products if same else None


def _is_usual(output: Any, count: int) -> bool:
    """(logits [1, count], weights [1, k], indices [1, k]), as nearly all routers give it."""
    return (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(part, torch.Tensor) for part in output)
        and output[0].numel() == count
        and not output[2].is_floating_point()
    )


def _logits_of(logits: torch.Tensor) -> Any:
    return logits.reshape(-1).float().numpy(force=True)
