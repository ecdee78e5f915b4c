# mypy: allow-untyped-defs
"""Kernels that write tokens into plain KV blocks, and read tokens of any."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cpu_kernels.jit import call_at, carray, entry, inner
from cpu_kernels.paged_attention_block import (
    BLOCK_TOKENS,
    EXPAND_FUNCTION,
    FROM_KEY,
    HEAD_NBYTES,
    KEY_COLUMNS,
    KEY_WIDTH,
    KEYS,
    OUTPUT_WIDTH,
    VALUE_COLUMNS,
    VALUES,
)
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_pointer,
    float32_to_element,
)

_LANES = 16


@inner
def _convert(source, target, value):
    return float32_to_element(target, element_to_float32(source, value))


@inner
def _write_by_token(source, target, panels, width, place, row):
    """One token's row into panels with lanes of tokens."""
    lying = carray(element_pointer(target, panels), (place // _LANES + 1, width, _LANES))
    for channel in range(width):
        lying[place // _LANES, channel, place % _LANES] = _convert(source, target, row[channel])


@inner
def _write_by_channel(source, target, panels, columns, block_tokens, place, row):
    """One token's row into panels with lanes of channels; channels after its last become zero."""
    lying = carray(element_pointer(target, panels), (columns // _LANES, block_tokens, _LANES))
    width = len(row)
    for panel in range(columns // _LANES):
        first = panel * _LANES
        if first + _LANES <= width:
            for lane in range(_LANES):
                lying[panel, place, lane] = _convert(source, target, row[first + lane])
        else:
            for lane in range(_LANES):
                if first + lane < width:
                    lying[panel, place, lane] = _convert(source, target, row[first + lane])
                else:
                    lying[panel, place, lane] = float32_to_element(target, np.float32(0))


@inner
def _write_token(source, target, fields, head, place, keys, values):
    """One head's token: its key and its value, at their addresses."""
    block_tokens = fields[BLOCK_TOKENS]
    key = carray(element_pointer(source, keys), (fields[KEY_WIDTH],))
    if fields[FROM_KEY]:
        _write_by_channel(source, target, head + fields[KEYS], fields[KEY_COLUMNS], block_tokens, place, key)
        return
    _write_by_token(source, target, head + fields[KEYS], fields[KEY_WIDTH], place, key)
    value = carray(element_pointer(source, values), (fields[OUTPUT_WIDTH],))
    _write_by_channel(source, target, head + fields[VALUES], fields[VALUE_COLUMNS], block_tokens, place, value)


@cache
def row_writer(source: Elements, target: Elements) -> Any:
    """Compiled write(fields, key, key_strides, value, value_strides, shape, offsets, addresses, first_tokens).

    Tokens of the elements `source` go to blocks of `target`. shape: (batch, heads, tokens). Strides are those of
    batch, head and token in bytes. key, value: addresses.
    """

    def write(
        fields: Any, key: int, key_strides: Any, value: int, value_strides: Any, shape: Any, offsets: Any,
        addresses: Any, first_tokens: Any,
    ) -> None:  # fmt: skip
        block_tokens = fields[BLOCK_TOKENS]
        for sequence in range(shape[0]):
            for token in range(shape[2]):
                at = first_tokens[sequence] + token
                block = addresses[offsets[sequence] + at // block_tokens]
                for number in range(shape[1]):
                    head = block + number * fields[HEAD_NBYTES]
                    keys = key + sequence * key_strides[0] + number * key_strides[1] + token * key_strides[2]
                    values = value + sequence * value_strides[0] + number * value_strides[1] + token * value_strides[2]
                    _write_token(source, target, fields, head, at % block_tokens, keys, values)

    return entry(
        "void(int64[::1], int64, int64[::1], int64, int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])"
    )(write)


@inner
def _read_by_channel(target, panels, block_tokens, first, tokens, out):
    lying = carray(float32_pointer(panels), ((out.shape[1] + _LANES - 1) // _LANES, block_tokens, _LANES))
    for token in range(tokens):
        for channel in range(out.shape[1]):
            out[token, channel] = float32_to_element(target, lying[channel // _LANES, first + token, channel % _LANES])


@inner
def _read_by_token(target, panels, block_tokens, first, tokens, out):
    lying = carray(float32_pointer(panels), (block_tokens // _LANES, out.shape[1], _LANES))
    for token in range(tokens):
        place = first + token
        for channel in range(out.shape[1]):
            out[token, channel] = float32_to_element(target, lying[place // _LANES, channel, place % _LANES])


@inner
def _read_head(target, fields, head, scratch, place, count, keys, values):
    """`count` tokens of one head from number `place` on."""
    block_tokens = fields[BLOCK_TOKENS]
    key_panels, value_panels = head + fields[KEYS], head + fields[VALUES]
    if fields[EXPAND_FUNCTION]:
        key_panels = scratch + 512
        value_panels = key_panels + 4 * fields[KEY_COLUMNS] * block_tokens
        call_at(fields[EXPAND_FUNCTION], (fields.ctypes.data, head, place + count, key_panels, value_panels, scratch))
    if fields[FROM_KEY]:
        _read_by_channel(target, key_panels, block_tokens, place, count, keys)
        _read_by_channel(target, key_panels, block_tokens, place, count, values)
    else:
        _read_by_token(target, key_panels, block_tokens, place, count, keys)
        _read_by_channel(target, value_panels, block_tokens, place, count, values)


@cache
def row_reader(target: Elements) -> Any:
    """Compiled read(fields, heads, addresses, first_token, tokens, keys, values).

    Tokens of a list of blocks go to [heads, tokens, key width] at the address `keys` and likewise to `values`, as
    elements `target`.
    """

    def read(fields: Any, heads: int, addresses: Any, first_token: int, tokens: int, key: int, value: int) -> None:
        block_tokens = fields[BLOCK_TOKENS]
        keys = carray(element_pointer(target, key), (heads, tokens, fields[KEY_WIDTH]))
        values = carray(element_pointer(target, value), (heads, tokens, fields[OUTPUT_WIDTH]))
        memory = np.empty(128 + (fields[KEY_COLUMNS] + fields[VALUE_COLUMNS]) * block_tokens, np.float32)
        done = 0
        while done < tokens:
            at = first_token + done
            place = at % block_tokens
            count = min(tokens - done, block_tokens - place)
            for number in range(heads):
                head = addresses[at // block_tokens] + number * fields[HEAD_NBYTES]
                mine = slice(done, done + count)
                _read_head(target, fields, head, memory.ctypes.data, place, count, keys[number, mine],
                           values[number, mine])  # fmt: skip
            done += count
        memory[0] = 0  # it is used by its address until here

    return entry("void(int64[::1], int64, int64[::1], int64, int64, int64, int64)")(read)
