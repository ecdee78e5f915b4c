"""Kernels among the attention functions of a model, as transformers lets a model overwrite one locally.

A module that dispatches through `AttentionInterface` gets an interface of its own. Which implementation the config
names still decides: that of "sdpa" knows one new token and prompts, others one new token where they are softmax
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import AttentionInterface, PreTrainedModel

from offload.hf.fused.attention import IMPLEMENTATION, attend, swap_forwards
from offload.hf.fused.other_attention import with_kernel
from offload.hf.fused.swap import rebind

_NAME = "ALL_ATTENTION_FUNCTIONS"


def fuse_attention(model: PreTrainedModel) -> int:
    """Modules whose forward dispatches through the interface; returns how many."""
    return swap_forwards(model, _with_kernels)


@cache
def _with_kernels(forward: Any) -> Any:
    scope = getattr(forward, "__globals__", {})
    if not isinstance(scope.get(_NAME), AttentionInterface):
        return None
    return rebind(forward, {_NAME: _interface()})


@cache
def _interface() -> AttentionInterface:
    return _KernelInterface()


class _KernelInterface(AttentionInterface):
    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The function of that name, with kernels."""
        if attn_implementation == IMPLEMENTATION:
            return attend
        return _known(super().get_interface(attn_implementation, default))


_known = cache(with_kernel)
