"""Hooks on routers that note their scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from offload.errors import SlowReadWarning
from offload.hf.fused.watch import TapeHook
from offload.moe.layer import ExpertsLayer
from offload.scores import RouterScores


def hear_routers(
    routers: Sequence[torch.nn.Module], layers: Sequence[ExpertsLayer], scores: RouterScores
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let each router's forward note the mean softmax of its logits, which is what traces record as scores."""
    return [
        router.register_forward_hook(_Hook(number, layer.count, scores))
        for number, (router, layer) in enumerate(zip(routers, layers, strict=True))
    ]


class _Hook(TapeHook):
    """A forward hook of one router."""

    def __init__(self, layer: int, count: int, scores: RouterScores) -> None:
        self._layer, self._count, self._scores = layer, count, scores
        self._warned = False

    def __call__(self, router: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Logits come first in what nearly all routers return."""
        logits = output[0] if isinstance(output, tuple) and output else output
        if isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.shape[-1:] == (self._count,):
            self._note(logits)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(router).__name__} of MoE layer {self._layer} returns no logits of {self._count} experts first; "
                "the cache policy goes by uses there, not by scores",
                SlowReadWarning,
                stacklevel=2,
            )

    def routed(
        self,
        router: torch.nn.Module,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        """The same without copies."""
        self._note(logits)

    def _note(self, logits: torch.Tensor) -> None:
        probabilities = logits.detach().reshape(-1, self._count).float().softmax(-1)
        self._scores.note(self._layer, probabilities.mean(0).numpy(force=True))
