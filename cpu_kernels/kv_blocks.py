"""Writing tokens into blocks of a paged KV cache, reading them, and packing full blocks."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks_kernel import row_reader, row_writer
from cpu_kernels.kv_pack_kernel import FP8, INT8, pack_eight_bits, pack_four_bits
from cpu_kernels.paged_attention import layout_fields
from cpu_kernels.simd import Elements
from cpu_kernels.tensors import describe, elements_of
from formats.kv import KvLayout

Int64 = npt.NDArray[np.int64]


@cache
def _elements(format: str) -> Elements:
    return elements_of({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format])


def write_tokens(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    offsets: Int64,
    addresses: Int64,
    first_tokens: Int64,
    layout: KvLayout,
) -> None:
    """Write consecutive tokens of each sequence into plain blocks, rounded to the blocks' format.

    Args:
        keys: [B, Hk, T, key_width] on the CPU, the channels of a token contiguous; bf16, fp16 or fp32.
        values: [B, Hk, T, value_width] of the same dtype; None where they come from the keys.
        offsets: int64 [B + 1]; sequence b's blocks are addresses[offsets[b] : offsets[b + 1]].
        addresses: int64, of blocks.
        first_tokens: int64 [B], where in its blocks each sequence's first new token goes.
        layout: of the blocks.

    Raises:
        ValueError: a quantised layout (its blocks are packed whole), tensors that do not fit it, or too few blocks.
    """
    if layout.is_quantised:
        raise ValueError(f"write_tokens: {layout.format} blocks are packed whole; write plain blocks and pack them")
    batch, heads, tokens = keys.shape[:3]
    expected = {"keys": (keys, layout.key_width)}
    if (values is None) != bool(layout.value_from_key):
        raise ValueError(f"values: expected {'None' if layout.value_from_key else 'a tensor'} for {layout}")
    if values is not None:
        expected["values"] = (values, layout.value_width)
    for name, (tensor, width) in expected.items():
        if (
            tensor.shape != (batch, layout.kv_heads, tokens, width)
            or tensor.dtype is not keys.dtype
            or not tensor.is_cpu
            or tensor.stride(3) != 1
        ):
            raise ValueError(
                f"{name}: expected [{batch}, {layout.kv_heads}, {tokens}, {width}] of {keys.dtype} on the CPU with "
                f"contiguous channels, found {describe(tensor)}"
            )
    _check_blocks(offsets, addresses, first_tokens, tokens, layout)
    other = keys if values is None else values
    write = row_writer(elements_of(keys.dtype), _elements(layout.format))
    key_strides, value_strides = (
        np.array(tensor.stride()[:3], np.int64) * keys.element_size() for tensor in (keys, other)
    )
    shape = np.array((batch, heads, tokens), np.int64)
    write(
        layout_fields(layout), keys.data_ptr(), key_strides, other.data_ptr(), value_strides, shape, offsets,
        addresses, first_tokens,
    )  # fmt: skip


class TokenWriter:
    """`write_tokens` of one token after the other of one sequence into one block, checked once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor | None, address: int, layout: KvLayout) -> None:
        """Prepare for tensors of this form.

        Args:
            keys: [1, Hk, 1, key_width], as of `write_tokens`.
            values: [1, Hk, 1, value_width] or None, likewise.
            address: of the block.
            layout: of it.
        """
        self._form = _form(keys, values, address)
        self._layout = layout
        self._offsets, self._addresses = np.array([0, 1]), np.array([address])
        self._place = np.zeros(1, np.int64)
        self._checked = False
        other = keys if values is None else values
        self._write = row_writer(elements_of(keys.dtype), _elements(layout.format))
        self._strides = [np.array(one.stride()[:3], np.int64) * keys.element_size() for one in (keys, other)]
        self._shape = np.array((1, layout.kv_heads, 1), np.int64)

    def takes(self, keys: torch.Tensor, values: torch.Tensor | None, address: int) -> bool:
        """Whether it was prepared for such tensors and this block."""
        return self._form == _form(keys, values, address)

    def write(self, keys: torch.Tensor, values: torch.Tensor | None, place: int) -> None:
        """Write a token.

        Args:
            keys: of a form that it takes.
            values: likewise.
            place: of the token in the block.

        Raises:
            ValueError: see `write_tokens`, and a place that the block does not have.
        """
        self._place[0] = place
        if not self._checked:
            write_tokens(keys, values, self._offsets, self._addresses, self._place, self._layout)
            self._checked = True
            return
        if not 0 <= place < self._layout.block_tokens:
            raise ValueError(f"place {place} of a block of {self._layout.block_tokens} tokens")
        other = keys if values is None else values
        self._write(
            layout_fields(self._layout), keys.data_ptr(), self._strides[0], other.data_ptr(), self._strides[1],
            self._shape, self._offsets, self._addresses, self._place,
        )  # fmt: skip


def _form(keys: torch.Tensor, values: torch.Tensor | None, address: int) -> tuple[object, ...]:
    own = keys.shape, keys.stride(), keys.dtype, keys.is_cpu, address
    return own if values is None else (*own, values.shape, values.stride(), values.dtype, values.is_cpu)


def read_tokens(
    addresses: Int64, first_token: int, tokens: int, layout: KvLayout, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one sequence's blocks of any format as tensors, rounded to a dtype.

    Args:
        addresses: int64, of the sequence's blocks.
        first_token: number of the first token within these blocks.
        tokens: how many.
        layout: of the blocks.
        dtype: of the results.

    Returns:
        keys [Hk, tokens, key_width] and values [Hk, tokens, output_width].

    Raises:
        ValueError: the blocks hold fewer tokens.
    """
    if first_token < 0 or tokens < 0 or first_token + tokens > len(addresses) * layout.block_tokens:
        raise ValueError(
            f"read_tokens: tokens {first_token} to {first_token + tokens} of {len(addresses)} blocks of "
            f"{layout.block_tokens}"
        )
    keys = torch.empty(layout.kv_heads, tokens, layout.key_width, dtype=dtype)
    values = torch.empty(layout.kv_heads, tokens, layout.output_width, dtype=dtype)
    read = row_reader(elements_of(dtype))
    fields = layout_fields(layout)
    read(fields, layout.kv_heads, addresses, first_token, tokens, keys.data_ptr(), values.data_ptr())
    return keys, values


def pack_block(source: int, source_layout: KvLayout, target: int, layout: KvLayout) -> None:
    """Pack a full plain block into a quantised one, with the bytes of `formats.kv_pack`.

    Args:
        source: address of the plain block.
        source_layout: its layout.
        target: address of layout.nbytes.
        layout: of the quantised block; heads, widths and tokens as the source's.

    Raises:
        ValueError: the layouts do not fit one another.
    """
    shapes = [
        (one.kv_heads, one.key_width, one.value_width, one.value_from_key, one.block_tokens)
        for one in (source_layout, layout)
    ]
    if shapes[0] != shapes[1] or source_layout.is_quantised or not layout.is_quantised:
        raise ValueError(f"pack_block: {source_layout} cannot be packed as {layout}")
    block = np.ctypeslib.as_array((ctypes.c_uint8 * layout.nbytes).from_address(target))
    block[:] = 0
    keys, values = read_tokens(np.array([source], np.int64), 0, layout.block_tokens, source_layout)
    for head in range(layout.kv_heads):
        mine = block[head * layout.head_nbytes : (head + 1) * layout.head_nbytes]
        _pack("key", keys[head].numpy(), layout.key_columns, layout, mine)
        if not layout.value_from_key:
            _pack("value", values[head].numpy(), layout.value_columns, layout, mine)


def _pack(
    name: str, numbers: npt.NDArray[np.float32], columns: int, layout: KvLayout, head: npt.NDArray[np.uint8]
) -> None:
    rows = numbers
    if columns != numbers.shape[1]:
        rows = np.zeros((len(numbers), columns), np.float32)
        rows[:, : numbers.shape[1]] = numbers
    by_channel = name == "value" or bool(layout.value_from_key)
    parts = {
        kind: head[part.offset : part.offset + part.nbytes]
        for kind in ("s", "_scales", "_zeros")
        if (part := layout.parts.get(name + kind)) is not None
    }
    if layout.is_int4:
        pack_four_bits(rows, by_channel, parts["s"], *(parts[kind].view(np.uint16) for kind in ("_scales", "_zeros")))
        return
    kind = FP8 if layout.format == "fp8_e4m3" else INT8
    split = layout.value_from_key or columns
    scales = parts["_scales"].ctypes.data
    for number, (first, end) in enumerate(((0, split), (split, columns))):
        if first < end or (layout.value_from_key and number):
            at = scales + 4 * layout.block_tokens * number
            pack_eight_bits(kind, rows, by_channel, first, end, parts["s"].ctypes.data, at)


def _check_blocks(offsets: Int64, addresses: Int64, first_tokens: Int64, tokens: int, layout: KvLayout) -> None:
    room = np.diff(offsets) * layout.block_tokens
    if offsets[-1] > len(addresses) or (first_tokens < 0).any() or (first_tokens + tokens > room).any():
        raise ValueError(
            f"first_tokens={first_tokens.tolist()}: {tokens} tokens do not fit lists of {np.diff(offsets).tolist()} "
            f"blocks of {layout.block_tokens}"
        )
