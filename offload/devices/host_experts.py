"""Experts on the CPU: the Numba kernels, and torch's products for many tokens where the CPU has them in 16 bits."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cpu_kernels.compiling.compiler import prepare
from cpu_kernels.expert_mlp import compile_kernels, expert_down, expert_mlp, expert_up
from cpu_kernels.linear import MOST_TOKENS
from cpu_kernels.packed_expert_mlp import (
    compile_packed_kernels,
    packed_expert_down,
    packed_expert_mlp,
    packed_expert_up,
)
from cpu_kernels.panel_mlp import (
    compile_panel_kernels,
    multiplies_pairs,
    panel_expert_down,
    panel_expert_mlp,
    panel_expert_up,
)
from cpu_kernels.routing_kernel import group_pairs
from cpu_kernels.weighted_sum import compile_sums
from cpu_kernels.wide_linear import takes_panels
from formats.bundle import BundleLayout
from offload.devices.base import ExpertBatch
from offload.devices.host_threads import kernel_pool
from offload.moe.gate import apply_gate
from offload.moe.layer import ExpertsLayer

FEW_TOKENS = 128
"""Up to here the kernel for rows is faster: it reads weights once at memory bandwidth, and computes while it waits for
them. Above it torch's products are. docs/performance.md has the measurement, of this and the next two.
"""

FEW_TOKENS_IN_PAIRS = 40
"""Likewise where panels have instructions for pairs of bf16; above it panels are faster."""

FEW_TOKENS_IN_FP32 = 2
"""Likewise where products are those of fp32, whatever the format; above it panels of 8 and 16 tokens are faster.

In a pass of at most MOST_TOKENS all go to the kernel for rows, as on a tape.
"""

_ROW_STEP = 16
_FINE_STEPS = 8


def run_experts(layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
    """See `Device.run_experts`. Which way an expert goes depends on its format and numbers of tokens alone."""
    if layer.layout.is_packed:
        _run_kernel(layer, batch, hidden, out)
        return
    counts = batch.offsets[1:] - batch.offsets[:-1]
    panels = takes_panels(layer.dtype)
    few = counts <= _most_on_rows(layer, len(hidden), panels=panels)
    if few.any():
        _run_kernel(layer, batch if few.all() else _select(batch, np.flatnonzero(few)), hidden, out)
    if few.all():
        return
    if panels:
        _run_kernel(layer, _select(batch, np.flatnonzero(~few)) if few.any() else batch, hidden, out, panels=True)
        return
    for index in np.flatnonzero(~few):
        pairs = slice(int(batch.offsets[index]), int(batch.offsets[index + 1]))
        tokens = torch.from_numpy(batch.tokens[pairs])
        result = _run_many(layer, int(batch.addresses[index]), _gather(hidden, tokens))
        _store(result[: len(tokens)], batch.rows[pairs], out)


def compile_for(layer: ExpertsLayer) -> None:
    """Compile the kernels that the layer's experts run on, or load them from Numba's cache."""
    prepare(group_pairs)
    compile_sums()
    if layer.layout.is_packed:
        compile_packed_kernels(layer.layout.format)
        return
    compile_kernels(layer.layout)
    if takes_panels(layer.dtype):
        compile_panel_kernels(layer.layout.format)


def _most_on_rows(layer: ExpertsLayer, tokens: int, *, panels: bool) -> int:
    """How many tokens of an expert at most go to the kernel for rows, in a pass of so many."""
    if not panels:
        return FEW_TOKENS
    if layer.dtype is torch.bfloat16 and multiplies_pairs():
        return FEW_TOKENS_IN_PAIRS
    return FEW_TOKENS_IN_FP32 if tokens > MOST_TOKENS else MOST_TOKENS


def _store(result: torch.Tensor, rows: npt.NDArray[np.int64], out: torch.Tensor) -> None:
    """Result to rows of `out`, in one pass where these lie side by side; rows are ascending."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        out[first : last + 1].copy_(result)
    else:
        out.index_copy_(0, torch.from_numpy(rows), result.to(torch.float32))


def _gather(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rows of some tokens, padded with zeros to a number of rows out of few.

    oneDNN compiles a kernel for every number of rows that it meets, and keeps about a megabyte for each: left alone,
    an expert's tokens come in every number there is.
    """
    count = len(tokens)
    step = _ROW_STEP if count <= _ROW_STEP * _FINE_STEPS else _ROW_STEP * _FINE_STEPS // 2
    rows = hidden.new_zeros(-(-count // step) * step, hidden.shape[1])
    torch.index_select(hidden, 0, tokens, out=rows[:count])
    return rows


def _select(batch: ExpertBatch, indices: npt.NDArray[np.intp]) -> ExpertBatch:
    pairs = np.concatenate([np.arange(batch.offsets[i], batch.offsets[i + 1]) for i in indices])
    offsets = np.zeros(len(indices) + 1, dtype=np.int64)
    np.cumsum(np.diff(batch.offsets)[indices], out=offsets[1:])
    return ExpertBatch(batch.addresses[indices], offsets, batch.tokens[pairs], batch.rows[pairs])


def _run_kernel(
    layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor, *, panels: bool = False
) -> None:
    inputs = _elements(hidden)
    if layer.layout.is_packed:
        whole, up, down = packed_expert_mlp, packed_expert_up, packed_expert_down
    elif panels:
        whole, up, down = panel_expert_mlp, panel_expert_up, panel_expert_down
    else:
        whole, up, down = expert_mlp, expert_up, expert_down
    pool = kernel_pool()
    if layer.activation is not None:
        whole(
            batch.addresses, layer.layout, batch.offsets, batch.tokens, inputs, layer.activation, out.numpy(),
            batch.rows, threads=pool,
        )  # fmt: skip
        return
    width = layer.layout.intermediate * (2 if layer.layout.has_gate else 1)
    projected = torch.empty(len(batch.tokens), width, dtype=torch.float32, device="cpu")
    up(batch.addresses, layer.layout, batch.offsets, batch.tokens, inputs, projected.numpy(), threads=pool)
    gated = apply_gate(layer.module, projected.to(layer.dtype), has_gate=layer.layout.has_gate)
    inputs = _elements(gated.contiguous())
    down(batch.addresses, layer.layout, batch.offsets, inputs, out.numpy(), batch.rows, threads=pool)


def _elements(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as the kernels take it: bf16, which numpy lacks, as its bits."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _run_many(layer: ExpertsLayer, address: int, rows: torch.Tensor) -> torch.Tensor:
    into, down, into_bias, down_bias = _weights(address, layer.layout, layer.dtype)
    gated = apply_gate(layer.module, F.linear(rows, into, into_bias), has_gate=layer.layout.has_gate)
    return F.linear(gated, down, down_bias)


@lru_cache(maxsize=4096)
def _weights(
    address: int, layout: BundleLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Views of a bundle in place: gate|up [2I, H] (or up [I, H]), down [H, I] and their biases.

    Only the address is remembered; whoever calls holds the memory.
    """
    memory = torch.frombuffer((ctypes.c_char * layout.nbytes).from_address(address), dtype=torch.uint8)

    def view(first: str, rows: int) -> torch.Tensor:
        component = layout.components[first]
        nbytes = component.nbytes * rows // component.shape[0]
        return memory[component.offset : component.offset + nbytes].view(dtype).view(rows, *component.shape[1:])

    first = "gate" if layout.has_gate else "up"
    into_rows = layout.intermediate * (2 if layout.has_gate else 1)
    into, down = view(first, into_rows), view("down", layout.hidden)
    if not layout.has_bias:
        return into, down, None, None
    return into, down, view(f"{first}_bias", into_rows), view("down_bias", layout.hidden)
