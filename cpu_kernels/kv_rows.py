# mypy: allow-untyped-defs, allow-untyped-calls
"""Keys and values that lie token after token: scores of some tokens, and weighted sums of their values.

While tokens are read as many bytes of what is read next are asked for, so that they come as fast as these are used.
"""

from __future__ import annotations

from cpu_kernels.cache_lines import ask_for
from cpu_kernels.jit import inner
from cpu_kernels.key_rows_simd import score_tile, takes_pairs
from cpu_kernels.kv_panels import row_nbytes
from cpu_kernels.kv_simd import PanelShape, has_many_registers, panel_add, panel_row, panel_zero
from cpu_kernels.simd import TileShape

_ONE_TO_ONE = TileShape(rows=1, tokens=1, chains=1)
_ONE_TO_TWO = TileShape(rows=1, tokens=2, chains=1)
_ONE_TO_FOUR = TileShape(rows=1, tokens=4, chains=1)
_ONE_TO_EIGHT = TileShape(rows=1, tokens=8, chains=1)
_TWO_TO_TWO = TileShape(rows=2, tokens=2, chains=1)
_TWO_TO_EIGHT = TileShape(rows=2, tokens=8, chains=1)
_FOUR_TO_ONE = TileShape(rows=4, tokens=1, chains=1)
_FOUR_TO_FOUR = TileShape(rows=4, tokens=4, chains=1)
_EIGHT_TO_TWO = TileShape(rows=8, tokens=2, chains=1)
_SIXTEEN_TO_ONE = TileShape(rows=16, tokens=1, chains=1)


@inner
def _score_tiles(
    elements, shape, at_once, single, keys, nbytes, groups, rows, queries, query_nbytes, out, out_nbytes, ahead
):
    """Tiles of `at_once` rows, and the last rows one by one."""
    whole = rows // at_once * at_once
    for row in range(0, whole, at_once):
        ask_for(ahead + row * nbytes, ahead + (row + at_once) * nbytes)
        score_tile(
            elements, shape, keys + row * nbytes, nbytes, groups, queries, query_nbytes, out + 4 * row, out_nbytes
        )
    for row in range(whole, rows):
        ask_for(ahead + row * nbytes, ahead + (row + 1) * nbytes)
        score_tile(
            elements, single, keys + row * nbytes, nbytes, groups, queries, query_nbytes, out + 4 * row, out_nbytes
        )


@inner
def score_rows(elements, code, keys, key_nbytes, groups, rows, queries, query_nbytes, heads, out, out_nbytes, ahead):
    """Out[h][t] = queries[h] · key t.

    elements: how they are multiplied. code: of their format. keys: address of `rows` keys of whole `groups`, see
    `score_tile`, key_nbytes apart. queries: address of [heads] queries, query_nbytes apart. out: address of fp32
    [heads][rows], out_nbytes apart. ahead: address of what is read next, of which as many bytes are asked for as keys
    have.
    """
    head = 0
    while head < heads:
        left = heads - head
        at, target = queries + head * query_nbytes, out + head * out_nbytes
        if has_many_registers(code) and left >= 8 and not takes_pairs(elements):
            _score_tiles(elements, _TWO_TO_EIGHT, 2, _ONE_TO_EIGHT, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 8
        elif has_many_registers(code) and left >= 4:
            _score_tiles(elements, _FOUR_TO_FOUR, 4, _ONE_TO_FOUR, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 4
        elif has_many_registers(code) and left >= 2:
            _score_tiles(elements, _EIGHT_TO_TWO, 8, _ONE_TO_TWO, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 2
        elif has_many_registers(code):
            _score_tiles(elements, _SIXTEEN_TO_ONE, 16, _ONE_TO_ONE, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 1
        elif left >= 2:
            _score_tiles(elements, _TWO_TO_TWO, 2, _ONE_TO_TWO, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 2
        else:
            _score_tiles(elements, _FOUR_TO_ONE, 4, _ONE_TO_ONE, keys, key_nbytes, groups, rows, at, query_nbytes,
                         target, out_nbytes, ahead)  # fmt: skip
            head += 1


_ONE_BY_ONE, _ONE_BY_FOUR = PanelShape(1, 1), PanelShape(1, 4)
_TWO_BY_ONE, _TWO_BY_TWO, _TWO_BY_FOUR = PanelShape(2, 1), PanelShape(2, 2), PanelShape(2, 4)
_FOUR_BY_ONE, _FOUR_BY_FOUR = PanelShape(4, 1), PanelShape(4, 4)
_EIGHT_BY_ONE, _EIGHT_BY_TWO = PanelShape(8, 1), PanelShape(8, 2)


@inner
def _weigh_strip(code, shape, width, values, nbytes, rows, weights, weights_nbytes, out, out_nbytes, ahead):
    """Sums of `width` panels of 16 channels, all in registers."""
    step = row_nbytes(code)
    tile = panel_zero(code, shape)
    for row in range(rows):
        ask_for(ahead + row * nbytes, ahead + row * nbytes + width * step)
        tile = panel_row(code, tile, values + row * nbytes, step, weights + 4 * row, weights_nbytes)
    panel_add(code, tile, out, out_nbytes)


@inner
def _weigh_strips(code, shape, width, single, values, nbytes, groups, rows, weights, weights_nbytes, out, out_nbytes,
                  ahead):  # fmt: skip
    whole = groups // width * width
    step = row_nbytes(code)
    for group in range(0, whole, width):
        _weigh_strip(code, shape, width, values + group * step, nbytes, rows, weights, weights_nbytes,
                     out + 64 * group, out_nbytes, ahead + group * step)  # fmt: skip
    for group in range(whole, groups):
        _weigh_strip(code, single, 1, values + group * step, nbytes, rows, weights, weights_nbytes, out + 64 * group,
                     out_nbytes, ahead + group * step)  # fmt: skip


@inner
def weigh_rows(code, values, value_nbytes, groups, rows, weights, weights_nbytes, heads, out, out_nbytes, ahead):
    """Out[h] += sum over t of weights[h][t] value t, token after token.

    values: address of `rows` values of 16 `groups` elements, value_nbytes apart. weights: address of fp32
    [heads][rows], weights_nbytes apart. out: address of fp32 [heads][16 groups], out_nbytes apart. ahead: see
    `score_rows`.
    """
    head = 0
    while head < heads:
        left = heads - head
        at, target = weights + head * weights_nbytes, out + head * out_nbytes
        if has_many_registers(code) and left >= 8:
            _weigh_strips(code, _EIGHT_BY_TWO, 2, _EIGHT_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 8
        elif has_many_registers(code) and left >= 4:
            _weigh_strips(code, _FOUR_BY_FOUR, 4, _FOUR_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 4
        elif left >= 4:
            _weigh_strips(code, _FOUR_BY_ONE, 1, _FOUR_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 4
        elif has_many_registers(code) and left >= 2:
            _weigh_strips(code, _TWO_BY_FOUR, 4, _TWO_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 2
        elif left >= 2:
            _weigh_strips(code, _TWO_BY_TWO, 2, _TWO_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 2
        else:
            _weigh_strips(code, _ONE_BY_FOUR, 4, _ONE_BY_ONE, values, value_nbytes, groups, rows, at,
                          weights_nbytes, target, out_nbytes, ahead)  # fmt: skip
            head += 1
