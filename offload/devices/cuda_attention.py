"""Blocks of a KV cache on a CUDA device: attention, reading, writing and packing, started on the current stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from formats.kv import KvLayout
from gpu_kernels import kv_blocks
from gpu_kernels.kv_packing import pack_blocks as packed_bytes
from gpu_kernels.kv_packing import unpack_blocks
from gpu_kernels.paged_attention import paged_attention
from offload.devices.base import AttentionBatch, AttentionPart, AttentionWork
from offload.devices.cuda_driver import CudaDriver

Int64 = npt.NDArray[np.int64]


class CudaAttention(AttentionWork):
    """Attention that was started."""

    def __init__(self, driver: CudaDriver, batch: AttentionBatch) -> None:
        """Start it.

        Args:
            driver: of the device.
            batch: blocks by address in the device's memory; the rest on the host, the query on either.

        Raises:
            torch.OutOfMemoryError: no room for queries and outputs.
        """
        device = driver.device
        offsets, addresses, lengths, firsts, positions = _uploaded(
            (batch.offsets, batch.addresses, batch.lengths, batch.first_positions, batch.query_positions), device
        )
        valid = None if batch.valid is None else torch.from_numpy(batch.valid).to(device)
        self._part = paged_attention(
            batch.query.to(device), offsets, addresses, lengths, firsts, positions, batch.layout, batch.scale,
            most_tokens=int(batch.lengths.max()), valid=valid,
        )  # fmt: skip

    def finish(self) -> AttentionPart:
        """Wait for it and bring it to the host."""
        out, lse = self._part
        return out.cpu(), lse.cpu()


def write_tokens(
    driver: CudaDriver,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    told: tuple[Int64, Int64, Int64],
    layout: KvLayout,
) -> None:
    """See `KvAccelerator.write_tokens`; told: offsets, addresses, first_tokens."""
    device = driver.device
    there = None if values is None else values.to(device)
    offsets, addresses, first_tokens = _uploaded(told, device)
    kv_blocks.write_tokens(keys.to(device), there, offsets, addresses, first_tokens, layout)


def read_blocks(blocks: list[torch.Tensor], tokens: int, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Fp32 keys [Hk, tokens, D] and values [Hk, tokens, V] of consecutive blocks, each uint8 [layout.nbytes]."""
    keys, values = (
        side.transpose(0, 1).flatten(1, 2)[:, :tokens].contiguous()
        for side in unpack_blocks(torch.stack(blocks), layout)
    )
    return keys, values


def pack_blocks(
    sources: list[torch.Tensor], source_layout: KvLayout, targets: list[torch.Tensor], layout: KvLayout
) -> None:
    """See `KvAccelerator.pack_blocks`, with blocks as their bytes."""
    keys, values = unpack_blocks(torch.stack(sources), source_layout)
    packed = packed_bytes(keys, None if layout.value_from_key else values, layout)
    for target, content in zip(targets, packed, strict=True):
        target.copy_(content)


def _uploaded(told: tuple[Int64, ...], device: torch.device) -> list[torch.Tensor]:
    """Arrays of the host on the device, in one copy, each where kernels may load 16 bytes at once."""
    starts = np.cumsum([0, *(numbers.size + numbers.size % 2 for numbers in told)])
    whole = np.zeros(starts[-1], np.int64)
    for start, numbers in zip(starts, told, strict=False):
        whole[start : start + numbers.size] = numbers.reshape(-1)
    there = torch.from_numpy(whole).to(device)
    return [
        there[start : start + numbers.size].view(numbers.shape) for start, numbers in zip(starts, told, strict=False)
    ]
