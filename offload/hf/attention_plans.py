"""Keep cuDNN's attention out of passes that it would have to plan anew for each number of tokens seen.

Newer versions of torch (2.11 does) take cuDNN first for `scaled_dot_product_attention` on compute capabilities 9.0 and
10.0 (PyTorch, `check_prefer_cudnn_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). cuDNN builds a
plan for each shape, on the host, for tens of milliseconds, and while a text grows every token has a shape of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

PLANNED_TOKENS = 2048
"""From so many new tokens on attention takes long enough for a plan to pay."""


class _Switch:
    """Torch's switch is the process's: off while anybody wants it off, then what it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = True

    def turn_off(self) -> None:
        with self._lock:
            if not self._holders:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._holders += 1

    def turn_back(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_switch = _Switch()


@contextmanager
def without_plans() -> Iterator[None]:
    """Attention within takes kernels that need no plan."""
    _switch.turn_off()
    try:
        yield
    finally:
        _switch.turn_back()


def avoid_plans(model: PreTrainedModel) -> None:
    """Passes of fewer than PLANNED_TOKENS tokens of a sequence are computed `without_plans`."""
    held = threading.local()

    def before(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward within a forward asks for nothing more.
        held.depth = getattr(held, "depth", 0) + 1
        if held.depth == 1:
            held.off = _new_tokens(args, kwargs) < PLANNED_TOKENS
            if held.off:
                _switch.turn_off()

    def after(*_: Any) -> None:
        # Called after a pass that failed before its first hook, too.
        if not getattr(held, "depth", 0):
            return
        held.depth -= 1
        if not held.depth and held.off:
            _switch.turn_back()

    model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for inputs in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if inputs is not None:
            return int(inputs.shape[1])
    return 1
