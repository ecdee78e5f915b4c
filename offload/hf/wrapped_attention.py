"""Wrapping the attention functions that a model's modules look up by name, for that model alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from offload.hf.fused.attention import swap_forwards
from offload.hf.fused.swap import rebind

_NAME = "ALL_ATTENTION_FUNCTIONS"
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Wrap = Callable[[Attention], Attention]


def wrap_attention(model: PreTrainedModel, wrap: Wrap) -> int:
    """Let every module that dispatches through transformers' interface use its functions wrapped, each time once.

    Args:
        model: the model.
        wrap: makes a function of another, of transformers' signature.

    Returns:
        Modules that were not wrapped so before.
    """
    return swap_forwards(model, _replacement(wrap))


@cache
def _replacement(wrap: Wrap) -> Callable[[Any], Any]:
    @cache
    def replacement(forward: Any) -> Any:
        interface = getattr(forward, "__globals__", {}).get(_NAME)
        if not isinstance(interface, AttentionInterface):
            return None
        if isinstance(interface, _WrappedInterface) and interface.wrap is wrap:
            return None
        return rebind(forward, {_NAME: _WrappedInterface(interface, wrap)})

    return replacement


class _WrappedInterface(AttentionInterface):
    """An interface whose functions are another's, wrapped.

    Attributes:
        wrap: see `wrap_attention`.
    """

    def __init__(self, inner: AttentionInterface, wrap: Wrap) -> None:
        super().__init__()
        self.wrap = wrap
        self._inner = inner
        self._wrapped: dict[Any, Attention] = {}

    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The function of that name."""
        function = self._inner.get_interface(attn_implementation, default)
        if function not in self._wrapped:
            self._wrapped[function] = self.wrap(function)
        return self._wrapped[function]
