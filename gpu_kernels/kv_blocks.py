"""Writing tokens into KV blocks in the GPU's memory."""

from __future__ import annotations

import torch

from formats.kv import KvLayout
from gpu_kernels.kv_blocks_kernel import write_tokens_kernel
from gpu_kernels.launch import DTYPE_OF_FORMAT, Threads, launch

_TOKENS = 16


def write_tokens(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    offsets: torch.Tensor,
    addresses: torch.Tensor,
    first_tokens: torch.Tensor,
    layout: KvLayout,
) -> None:
    """Write consecutive tokens of each sequence into plain blocks, rounded to the blocks' format; nothing waits.

    As `cpu_kernels.kv_blocks.write_tokens`, with everything on the GPU, where blocks cannot be counted without waiting:
    that each sequence has enough of them is the caller's to know.

    Args:
        keys: [B, Hk, T, key_width], the channels of a token contiguous; bf16, fp16 or fp32.
        values: [B, Hk, T, value_width] of the same dtype; None where they come from the keys.
        offsets: int64 [B + 1] or [B]; sequence b's blocks begin at addresses[offsets[b]].
        addresses: int64, of blocks in the GPU's memory.
        first_tokens: int64 [B], where in its blocks each sequence's first new token goes.
        layout: of the blocks.

    Raises:
        ValueError: a quantised layout (its blocks are packed whole), or tensors that do not fit it.
    """
    if layout.is_quantised:
        raise ValueError(f"write_tokens: {layout.format} blocks are packed whole; write plain blocks and pack them")
    if (values is None) != bool(layout.value_from_key):
        raise ValueError(f"values: expected {'None' if layout.value_from_key else 'a tensor'} for {layout}")
    sequences, _, tokens, _ = keys.shape
    other = keys if values is None else values
    width = layout.key_width if values is None else layout.value_width
    for name, tensor, channels in (("keys", keys, layout.key_width), ("values", other, width)):
        if (
            tensor.shape != (sequences, layout.kv_heads, tokens, channels)
            or tensor.dtype is not keys.dtype
            or tensor.dtype not in DTYPE_OF_FORMAT.values()
            or (channels > 1 and tensor.stride(3) != 1)
        ):
            raise ValueError(
                f"{name}: expected [{sequences}, {layout.kv_heads}, {tokens}, {channels}] of {keys.dtype} with "
                f"contiguous channels, found {tensor.dtype} {tuple(tensor.shape)}"
            )
    for name, numbers, most in (
        ("offsets", offsets, sequences + 1), ("addresses", addresses, None), ("first_tokens", first_tokens, sequences),
    ):  # fmt: skip
        fits = numbers.dim() == 1 and (most is None or most - 1 <= len(numbers) <= most)
        if numbers.dtype != torch.int64 or not fits or numbers.device != keys.device:
            raise ValueError(f"{name}: expected int64 on {keys.device}, found {numbers.dtype} {tuple(numbers.shape)}")
    launch(
        write_tokens_kernel,
        (sequences, layout.kv_heads, -(-tokens // _TOKENS)),
        (keys, other, offsets, addresses, first_tokens, tokens, *keys.stride()[:3], *other.stride()[:3]),
        Threads(warps=4),
        keys.device,
        FORMAT=layout.format,
        KEYS=layout.parts["keys"].offset,
        VALUES=0 if values is None else layout.parts["values"].offset,
        HEAD_NBYTES=layout.head_nbytes,
        BLOCK=layout.block_tokens,
        WIDTH=layout.key_width,
        VALUE=layout.output_width,
        LATENT=values is None,
        DEPTH=_power_of_two(layout.key_width),
        COLUMNS=_power_of_two(layout.output_width),
        TOKENS=_TOKENS,
    )


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
