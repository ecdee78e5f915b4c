# mypy: allow-untyped-defs, allow-untyped-calls
"""The online softmax of a row that sees a whole block of 64 tokens, without a detour through memory.

Scores stay in four vectors from the products with keys to the weights of values: what is stored in vectors of one
length and read in those of another is waited for. The numbers are those of `kv_softmax`'s loops.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.jit import inner
from cpu_kernels.kv_pairs import store_rounded_four
from cpu_kernels.kv_softmax import (
    add_exponentials,
    hide,
    largest_so_far,
    load_four,
    multiply_four,
    rows_add,
    rows_exp_below,
    rows_max,
    rows_maximum,
    rows_store,
    rows_sum,
)
from cpu_kernels.packing_simd import rows_splat

WHOLE_TOKENS = 64
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


@inner
def _times(rows, address, factors):
    """Each of four vectors times the numbers at an address, which are multiplied by factors first."""
    return multiply_four(rows, multiply_four(load_four(address), (factors, factors, factors, factors)))


@inner
def weigh_whole_row(row, scale, scaled, key_scales, value_scales, code_factor, rounds, part, width):
    """Products of one query and a block's 64 keys turned into the weights of its values, in place.

    row: address of fp32 [64]. scale: of scores. scaled: whether a token has a scale for its key and one for its value,
    at the addresses key_scales and value_scales, both times code_factor. rounds: whether weights are rounded as
    `kv_pairs.round_row` does. part: address of fp32 [width]: the sums so far, ..., the largest score, the sum of
    exponentials; brought to the largest score.
    """
    factors = rows_splat(scale)
    numbers = load_four(row)
    if scaled:
        numbers = _times(numbers, key_scales, rows_splat(code_factor))
    a, b, c, d = multiply_four(numbers, (factors, factors, factors, factors))
    largest = rows_maximum(rows_max(rows_max(rows_max(a, b), c), d))
    if largest == _MINUS_INFINITY:
        hide(row, 0, 0, WHOLE_TOKENS, _ZERO)
        return
    largest = largest_so_far(part, width, largest)
    above = rows_splat(largest)
    a, b, c, d = rows_exp_below(a, above), rows_exp_below(b, above), rows_exp_below(c, above), rows_exp_below(d, above)
    total = rows_sum(rows_add(rows_add(rows_add(a, b), c), d))
    add_exponentials(part, width, largest, total)
    numbers = a, b, c, d
    if scaled:
        numbers = _times(numbers, value_scales, rows_splat(code_factor))
    a, b, c, d = numbers
    if rounds:
        store_rounded_four(numbers, row, 4 * WHOLE_TOKENS)
    else:
        rows_store(row, a)
        rows_store(row + 64, b)
        rows_store(row + 128, c)
        rows_store(row + 192, d)
