"""Calls of the runtime's kernels on an accelerator, on weights that are not in its caches, until the device is done."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from offload.devices.base import Accelerator
from offload.hf.attention_plans import PLANNED_TOKENS, without_plans
from offload.hf.quantised_linear import QuantisedLinear
from offload.measuring import kernels
from offload.measuring.kernels import ExpertCalls, random_linear
from profiler.accelerator import experts_of_call
from profiler.subjects import Attention, Product

COLD_NBYTES = 768 << 20
"""Calls take their weights from so many bytes in turn: the largest caches of GPUs hold a sixth of it."""
_IN_A_ROW = 8
"""Linear layers, and calls of attention, of a run: in a pass nothing waits between them."""
_MOST_LAYERS = 256
_STREAM_NBYTES = 512 << 20
_STREAM_REPEATS = 5


class SlotCalls(ExpertCalls):
    """Experts in an accelerator's slots, as the MoE step calls them: hidden states are there, pairs go there, outputs
    come back to the host, and the step waits.
    """

    def __init__(self, device: Accelerator, format: str, *, narrow: bool) -> None:
        # Twice what the largest call takes: the next one must not find the last one's weights.
        fewest = 2 * experts_of_call(1)
        super().__init__(format, narrow=narrow, device=device, cold_nbytes=COLD_NBYTES, fewest=fewest)

    def product(self, count: int, tokens: int) -> Product:
        """`count` experts with `tokens` tokens each on average, as uneven as a router makes them."""
        hidden, intermediate = self._layout.hidden, self._layout.intermediate
        # What enters and leaves is moved whatever the format is.
        entries = (hidden + 3 * intermediate) * count
        loads = kernels.uneven_loads(count, tokens)
        return Product(3 * hidden * intermediate * count, self._called(loads), entries, items=count)


class DeviceLinears:
    """Linear layers of `rows` outputs on a device, as a loaded model calls them, some in a row."""

    def __init__(self, format: str, rows: int, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._dtype = kernels.compute_dtype(format)
        # Copied on the device: many copies over the link would take longer than measuring.
        first = copy.deepcopy(random_linear(format, rows)).to(device)
        held = sum(tensor.nbytes for tensor in [*first.parameters(), *first.buffers()])
        count = min(_MOST_LAYERS, max(2 * _IN_A_ROW, COLD_NBYTES // held))
        self._layers = [_copy_of(first) for _ in range(count)]
        self._turn: Iterator[Any] = itertools.cycle(self._layers)

    def product(self, tokens: int, finish: Callable[[], None]) -> Product:
        """Calls with `tokens` tokens; `finish` returns when they are done."""
        x = torch.randn(1, tokens, kernels.HIDDEN).to(self._device, self._dtype)

        def run() -> None:
            with torch.no_grad():
                for _ in range(_IN_A_ROW):
                    next(self._turn)(x)
            finish()

        return Product(self._rows * kernels.HIDDEN, run, self._rows + kernels.HIDDEN, _IN_A_ROW)


def _copy_of(layer: torch.nn.Module) -> torch.nn.Module:
    made = copy.deepcopy(layer)
    if isinstance(made, QuantisedLinear):
        made.weights_moved()
    return made


def device_attention(
    new_tokens: int, cached_tokens: int, device: torch.device, finish: Callable[[], None], *, narrow: bool = False
) -> Attention:
    """Attention of one layer with grouped heads in bf16 as transformers' "sdpa" calls it on a device, some in a row.

    Args:
        new_tokens: 1, or as many as are seen: no other passes are measured.
        cached_tokens: before them.
        device: that computes.
        finish: returns when it is done.
        narrow: heads have few products for each score.
    """
    assert new_tokens == 1 or cached_tokens == 0
    seen = cached_tokens + new_tokens
    width = kernels.NARROW_HEAD_WIDTH if narrow else kernels.HEAD_WIDTH
    query = torch.randn(1, kernels.HEADS, new_tokens, width).to(device, torch.bfloat16)
    first = torch.randn(1, kernels.KV_HEADS, seen, width).to(device, torch.bfloat16)
    copies = max(1, min(64, COLD_NBYTES // (2 * first.nbytes)))
    caches = itertools.cycle([(first.clone(), first.clone()) for _ in range(copies)])

    def run() -> None:
        # As a loaded model's passes of so many tokens do.
        with torch.no_grad(), without_plans() if new_tokens < PLANNED_TOKENS else nullcontext():
            for _ in range(_IN_A_ROW):
                key, value = next(caches)
                F.scaled_dot_product_attention(query, key, value, is_causal=new_tokens > 1, enable_gqa=True)
        finish()

    scores = kernels.HEADS * new_tokens * (cached_tokens + (new_tokens + 1) / 2)
    return Attention(2 * first.nbytes, 4.0 * width * scores, run, _IN_A_ROW, scores)


def device_stream(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Bytes per second at which a device sums a large fp32 tensor: the best of some repeats.

    Args:
        device: that is measured.
        seconds: of a call, until the device is done.
    """
    memory = torch.zeros(_STREAM_NBYTES // 4, device=device)

    def run() -> None:
        for _ in range(_IN_A_ROW):
            memory.sum()

    run()
    return _IN_A_ROW * memory.nbytes / min(seconds(run) for _ in range(_STREAM_REPEATS))
