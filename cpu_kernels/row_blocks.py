# mypy: allow-untyped-defs
"""Consecutive rows of a row-major matrix times a few inputs: what the kernels for few tokens have in common.

Each weight is fetched from memory once: up to three tokens pass a row at a time, more pass four rows four at a time
while these rows lie in the first-level cache. With 32 registers four pass a row at a time too, where no more than
seven come and all inputs lie there.
"""

from __future__ import annotations

from cpu_kernels.jit import inner
from cpu_kernels.simd import (
    CHAINS,
    STEP_BYTES,
    TileShape,
    elements_per_step,
    has_many_registers,
    prefetch_four_lines,
    tile_add,
    tile_dot,
    tile_dot_chains,
    tile_dot_tail,
    tile_store,
    tile_zero,
)

# Weight rows that are read together where many tokens pass.
GROUP_ROWS = 4

# How far ahead of the row at hand to ask for weights: about the bytes that arrive in the latency of memory.
PREFETCH_BYTES = 4096

# Inputs that stay in the first-level cache beside the weights that pass.
_NEAR_BYTES = 20 << 10

_ONE_TOKEN = TileShape(rows=1, tokens=1, chains=CHAINS)
_TWO_TOKENS = TileShape(rows=1, tokens=2, chains=CHAINS)
_THREE_TOKENS = TileShape(rows=1, tokens=3, chains=CHAINS)
_FOUR_TOKENS = TileShape(rows=1, tokens=4, chains=CHAINS)
_FOUR_BY_FOUR = TileShape(rows=4, tokens=4, chains=1)


@inner
def _row_by_row(elements, shape, weights, columns, rows, inputs, outputs, output_offset, end, following):
    """Dot products of `rows` consecutive weight rows with shape.tokens inputs, stored.

    Weights are fetched ahead: up to about `end`, and from `following` on after that.
    """
    step = elements_per_step(elements)
    row_bytes = columns * (STEP_BYTES // step)
    steps = columns // step
    in_chains = steps // CHAINS * CHAINS
    tail = columns - steps * step
    for row in range(rows):
        here = weights + row * row_bytes
        ahead = here + PREFETCH_BYTES
        ahead = ahead if ahead < end else ahead - end + following
        tile = tile_zero(shape)
        for i in range(0, in_chains, CHAINS):
            prefetch_four_lines(ahead + i * STEP_BYTES)
            tile = tile_dot_chains(elements, tile, here, row_bytes, inputs, i * STEP_BYTES)
        for i in range(in_chains, steps):
            tile = tile_dot(elements, tile, here, row_bytes, inputs, i * STEP_BYTES)
        if tail > 0:
            tile = tile_dot_tail(elements, tile, here, row_bytes, inputs, steps * STEP_BYTES, tail)
        tile_store(tile, outputs, output_offset + 4 * row)


@inner
def _few_tokens(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, end, following):
    """`rows` consecutive weight rows times up to three tokens."""
    if tokens == 1:
        _row_by_row(elements, _ONE_TOKEN, weights, columns, rows, inputs, outputs, output_offset, end, following)
    elif tokens == 2:
        _row_by_row(elements, _TWO_TOKENS, weights, columns, rows, inputs, outputs, output_offset, end, following)
    elif tokens == 3:
        _row_by_row(elements, _THREE_TOKENS, weights, columns, rows, inputs, outputs, output_offset, end, following)


@inner
def _four_rows(elements, weights, columns, inputs, outputs, output_offset, following):
    """Dot products of four weight rows with four inputs, stored; one chain after the other, all in registers.

    Fetches four rows' worth of weights from `following` on.
    """
    step = elements_per_step(elements)
    row_bytes = columns * (STEP_BYTES // step)
    steps = columns // step
    in_chains = steps // CHAINS * CHAINS
    total = tile_zero(_FOUR_BY_FOUR)
    for i in range(0, in_chains, CHAINS):
        prefetch_four_lines(following + i * STEP_BYTES)
        total = tile_dot(elements, total, weights, row_bytes, inputs, i * STEP_BYTES)
    for i in range(in_chains, steps):
        total = tile_dot(elements, total, weights, row_bytes, inputs, i * STEP_BYTES)
    if columns > steps * step:
        total = tile_dot_tail(elements, total, weights, row_bytes, inputs, steps * STEP_BYTES, columns - steps * step)
    for chain in range(1, CHAINS):
        tile = tile_zero(_FOUR_BY_FOUR)
        fetched = following + chain * row_bytes
        for i in range(0, in_chains, CHAINS):
            prefetch_four_lines(fetched + i * STEP_BYTES)
            tile = tile_dot(elements, tile, weights, row_bytes, inputs, (i + chain) * STEP_BYTES)
        total = tile_add(total, tile)
    tile_store(total, outputs, output_offset)


@inner
def multiply_rows(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, following):
    """Dot products of `rows` consecutive weight rows with `tokens` inputs, stored as fp32.

    inputs, outputs: addresses of tables of int64, the address of each input and of each output row.
    output_offset: bytes from the start of an output row to the dot product of the first weight row.
    following: the weights to be read next, or any that are at hand; they are fetched ahead.
    """
    row_bytes = columns * (STEP_BYTES // elements_per_step(elements))
    end = weights + rows * row_bytes
    by_row = has_many_registers(elements) and tokens < 8 and tokens * row_bytes <= _NEAR_BYTES
    if tokens < 4:
        _few_tokens(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, end, following)
        return
    for group in range(0, rows, GROUP_ROWS):
        here = weights + group * row_bytes
        offset = output_offset + 4 * group
        count = min(GROUP_ROWS, rows - group)
        after = here + count * row_bytes
        after = after if after < end else following
        in_fours = tokens // 4 * 4 if count == GROUP_ROWS else 0
        for token in range(0, in_fours, 4):
            table = 8 * token
            if by_row:
                _row_by_row(
                    elements,
                    _FOUR_TOKENS,
                    here,
                    columns,
                    count,
                    inputs + table,
                    outputs + table,
                    offset,
                    end,
                    following,
                )
            else:
                _four_rows(elements, here, columns, inputs + table, outputs + table, offset, after)
        for token in range(in_fours, tokens, 3):
            table = 8 * token
            few = min(3, tokens - token)
            _few_tokens(elements, here, columns, count, inputs + table, outputs + table, offset, few, end, following)
