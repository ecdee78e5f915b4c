# mypy: allow-untyped-defs, allow-untyped-calls
"""One head of one block: scores of its tokens, and weighted sums of its values, by format.

A few query rows read codes in place. Where more share a block, and in latent attention, it is first widened to fp32,
in panels of 16 lanes with their scales applied. `keys`, `values` and so on are fields of the job, bytes from the
head's start; `head` is its address.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import overload

from cpu_kernels.compiling.inlined import InlinedCompiler
from cpu_kernels.jit import call_at, carray, function_address, inner, intrinsic
from cpu_kernels.kv_pairs import (
    add_int4_half,
    largest_rounded,
    multiply_int8_panels,
    round_row,
    round_rows,
    store_rounded_four,
)
from cpu_kernels.kv_panels import dot_panels, expand_rows, multiply_panels, row_nbytes
from cpu_kernels.kv_simd import FP8_FACTOR, KvCode
from cpu_kernels.kv_softmax import load_four, multiply_four, multiply_row, rows_add, rows_store, rows_sum
from cpu_kernels.packing_simd import rows_larger, rows_largest, rows_load, rows_multiply, rows_splat, rows_type
from cpu_kernels.simd import float32_pointer, int64_pointer

# Fields of a job that describe its blocks.
(
    GROUP,  # query heads of a key-value head
    KEY_WIDTH,
    KEY_ROWS,  # of a panel of keys
    KEY_COLUMNS,
    VALUE_COLUMNS,
    OUTPUT_WIDTH,
    FROM_KEY,
    BLOCK_TOKENS,
    HEAD_NBYTES,
    KEYS,
    KEY_SCALES,
    KEY_ZEROS,
    VALUES,
    VALUE_SCALES,
    VALUE_ZEROS,
    QUERY_NBYTES,
    PART_NBYTES,
    ROW_NBYTES,  # of a panel
    HAS_SCALES,
    HAS_TOKEN_SCALES,  # fp8_e4m3 and int8
    CODE_FACTOR,  # fp32, as its bits: what a lane's number of `kv_simd` lacks
    ROUNDS_WEIGHTS,  # int8: MULTIPLY_FUNCTION takes rounded weights
    MULTIPLY_FUNCTION,  # addresses of functions below; the last three 0 where they are not needed
    EXPAND_FUNCTION,
    INT4_SCORES_FUNCTION,
    INT4_VALUES_FUNCTION,
    LAYOUT_FIELDS,
) = range(27)

_OPTIONS: Any = {"error_model": "numpy", "nogil": True, "pipeline_class": InlinedCompiler}


@intrinsic
def rows_from_bf16(typingctx: Any, address: Any) -> Any:
    """16 bf16 numbers at an address, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow, wide = ir.VectorType(ir.IntType(16), 16), ir.VectorType(ir.IntType(32), 16)
        stored = builder.load(builder.inttoptr(arguments[0], narrow.as_pointer()), align=2)
        bits = builder.shl(builder.zext(stored, wide), ir.Constant(wide, [16] * 16))
        return builder.bitcast(bits, ir.VectorType(ir.FloatType(), 16))

    return rows_type(types.int64), codegen


@intrinsic
def bf16_at(typingctx: Any, address: Any) -> Any:
    """The bf16 number at an address, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i16, i32 = ir.IntType(16), ir.IntType(32)
        stored = builder.load(builder.inttoptr(arguments[0], i16.as_pointer()), align=2)
        bits = builder.shl(builder.zext(stored, i32), ir.Constant(i32, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int64), codegen


@inner
def float32_at(address):
    """The fp32 number at an address."""
    return carray(float32_pointer(address), (1,))[0]


def _constant(name: str, of_code: Any) -> Any:
    @intrinsic
    def constant(typingctx: Any, code: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return ir.Constant(ir.IntType(64), of_code(code.code))

        return types.int64(code), codegen

    constant.__name__ = name
    return constant


has_token_scales = _constant("has_token_scales", lambda code: int(code.has_token_scales))
_is_fp8 = _constant("_is_fp8", lambda code: int(code.format == "fp8_e4m3"))


@inner
def code_factor(code):
    """What a lane's number of `kv_simd` lacks."""
    return np.float32(FP8_FACTOR) if _is_fp8(code) else np.float32(1)


@inner
def ready_queries(job, queries, rows, out):
    """Address of queries as `key_products` takes them; out: address of as much memory."""
    if not job[ROUNDS_WEIGHTS]:
        return queries
    round_rows(queries, job[KEY_WIDTH], rows, out, job[QUERY_NBYTES])
    return out


@inner
def key_products(job, head, tokens, queries, rows, out, scratch, ahead):
    """Out[r][t] = queries[r] · key t for the panels of the first `tokens` tokens, without the scales of 8-bit formats.

    queries: address of fp32 [rows][16 w], zero after key_width, made ready. out: address of fp32
    [rows][block_tokens]. scratch: of two rows more than queries. ahead: address of what is read next.
    """
    if job[INT4_SCORES_FUNCTION]:
        call_at(job[INT4_SCORES_FUNCTION], (job.ctypes.data, head, tokens, queries, rows, out, scratch, ahead))
        return
    call_at(job[MULTIPLY_FUNCTION], (head + job[KEYS], job[KEY_ROWS] * job[ROW_NBYTES], (tokens + 15) // 16,
                                     job[KEY_WIDTH], queries, job[QUERY_NBYTES], rows, out, 4 * job[BLOCK_TOKENS], 0,
                                     ahead))  # fmt: skip


@inner
def scale_scores(job, head, tokens, rows, out):
    """Scales of 8-bit formats applied to `key_products`."""
    if job[HAS_TOKEN_SCALES]:
        factor = float32_at(job.ctypes.data + 8 * CODE_FACTOR)
        for row in range(rows):
            multiply_row(out + row * 4 * job[BLOCK_TOKENS], head + job[KEY_SCALES], factor, (tokens + 15) // 16 * 16)


@inner
def scale_weights(job, head, tokens, weights, rows):
    """Weights of values as `add_values` takes them: 8-bit formats overwrite them with weights times scales.

    weights: address of fp32 [rows][block_tokens], zero up to a multiple of 16.
    """
    nbytes = 4 * job[BLOCK_TOKENS]
    if job[ROUNDS_WEIGHTS] and tokens % 16 == 0:
        _scale_and_round_rows(weights, head + job[VALUE_SCALES], tokens, rows, nbytes)
    elif job[HAS_TOKEN_SCALES]:
        factor = float32_at(job.ctypes.data + 8 * CODE_FACTOR)
        for row in range(rows):
            _multiply_some(weights + row * nbytes, head + job[VALUE_SCALES], tokens, factor)
        if job[ROUNDS_WEIGHTS]:
            round_rows(weights, tokens, rows, weights, nbytes)


@inner
def add_values(job, head, tokens, weights, rows, out, scratch, ahead):
    """Out[r][c] += sum over t < tokens of weights[r][t] value t's channel c.

    weights: address of [rows][block_tokens] of `scale_weights`. out: address of rows of PART_NBYTES. scratch: of two
    rows more than weights. ahead: address of what is read next.
    """
    nbytes = 4 * job[BLOCK_TOKENS]
    if job[INT4_VALUES_FUNCTION]:
        call_at(job[INT4_VALUES_FUNCTION], (job.ctypes.data, head, tokens, weights, rows, out, scratch, ahead))
        return
    call_at(job[MULTIPLY_FUNCTION], (head + job[VALUES], job[BLOCK_TOKENS] * job[ROW_NBYTES], job[VALUE_COLUMNS] // 16,
                                     tokens, weights, nbytes, rows, out, job[PART_NBYTES], 1, ahead))  # fmt: skip


@inner
def _int4_scores(code, job, head, tokens, queries, rows, out, scratch, ahead):
    width, query_nbytes, out_nbytes = job[KEY_WIDTH], job[QUERY_NBYTES], 4 * job[BLOCK_TOKENS]
    panel_nbytes = job[KEY_ROWS] * job[ROW_NBYTES]
    for group in range((tokens + 31) // 32):
        offset = group // 2 * panel_nbytes
        place = 2 * width * group
        _scale_and_round(queries, rows, query_nbytes, head + job[KEY_SCALES] + place, head + job[KEY_ZEROS] + place,
                         width, scratch, out + 128 * group, out_nbytes, False)  # fmt: skip
        add_int4_half(code, head + job[KEYS] + offset + group % 2 * 32, width, scratch, query_nbytes, rows,
                      out + 128 * group, out_nbytes, ahead + group * ((width + 3) // 4 * 64))  # fmt: skip


@inner
def _int4_values(code, job, head, tokens, weights, rows, out, scratch, ahead):
    block_tokens, out_nbytes = job[BLOCK_TOKENS], job[PART_NBYTES]
    nbytes, panel_nbytes = 4 * block_tokens, block_tokens * job[ROW_NBYTES]
    for group in range(job[VALUE_COLUMNS] // 32):
        offset = group // 2 * panel_nbytes
        place = 2 * block_tokens * group
        _scale_and_round(weights, rows, nbytes, head + job[VALUE_SCALES] + place, head + job[VALUE_ZEROS] + place,
                         tokens, scratch, out + 128 * group, out_nbytes, True)  # fmt: skip
        add_int4_half(code, head + job[VALUES] + offset + group % 2 * 32, tokens, scratch, nbytes, rows,
                      out + 128 * group, out_nbytes, ahead + group * block_tokens * 16)  # fmt: skip


@inner
def _scale_and_round(weights, rows, nbytes, scales, zeros, count, scaled, out, out_nbytes, add):
    """Scaled[r] = weights[r] scales, rounded, and the sum of weights[r] zeros for each of 32 numbers at out[r].

    weights: address of fp32 [rows][count], nbytes apart, zero up to a multiple of 16. scales, zeros: addresses of bf16
    [count]. scaled: of two rows more. add: whether to add to what is there.
    """
    if count == 64:
        _scale_and_round_whole(weights, rows, nbytes, scales, zeros, scaled, out, out_nbytes, add)
        return
    wide_scales, wide_zeros = scaled + rows * nbytes, scaled + (rows + 1) * nbytes
    for i in range(0, count, 16):
        rows_store(wide_scales + 4 * i, rows_from_bf16(scales + 2 * i))
        rows_store(wide_zeros + 4 * i, rows_from_bf16(zeros + 2 * i))
    # What follows the last may be anything.
    for i in range(count, (count + 15) // 16 * 16):
        carray(float32_pointer(wide_scales + 4 * i), (1,))[0] = np.float32(0)
        carray(float32_pointer(wide_zeros + 4 * i), (1,))[0] = np.float32(0)
    limit = largest_rounded(count)
    for row in range(rows):
        weight, target = weights + row * nbytes, scaled + row * nbytes
        total = largest = rows_splat(np.float32(0))
        for i in range(0, 4 * count, 64):
            numbers = rows_load(weight + i)
            product = rows_multiply(numbers, rows_load(wide_scales + i))
            rows_store(target + i, product)
            largest = rows_larger(largest, product)
            total = rows_add(total, rows_multiply(numbers, rows_load(wide_zeros + i)))
        round_row(target, count, limit, rows_largest(largest), target, nbytes)
        shift = rows_splat(rows_sum(total))
        for i in range(0, 128, 64):
            at = out + row * out_nbytes + i
            rows_store(at, rows_add(rows_load(at), shift) if add else shift)


@inner
def _four_bf16(address):
    return (
        rows_from_bf16(address),
        rows_from_bf16(address + 32),
        rows_from_bf16(address + 64),
        rows_from_bf16(address + 96),
    )


@inner
def _scale_and_round_whole(weights, rows, nbytes, scales, zeros, scaled, out, out_nbytes, add):
    """`_scale_and_round` of 64 numbers, in registers."""
    wide_scales, wide_zeros = _four_bf16(scales), _four_bf16(zeros)
    zero = rows_splat(np.float32(0))
    for row in range(rows):
        numbers = load_four(weights + row * nbytes)
        store_rounded_four(multiply_four(numbers, wide_scales), scaled + row * nbytes, nbytes)
        a, b, c, d = multiply_four(numbers, wide_zeros)
        shift = rows_splat(rows_sum(rows_add(rows_add(rows_add(rows_add(zero, a), b), c), d)))
        for i in range(0, 128, 64):
            at = out + row * out_nbytes + i
            rows_store(at, rows_add(rows_load(at), shift) if add else shift)


@inner
def _scale_and_round_rows(weights, scales, tokens, rows, nbytes):
    """`_multiply_some` and `round_rows` in one pass, of whole panels of tokens of int8, in place."""
    limit = largest_rounded(tokens)
    for row in range(rows):
        at = weights + row * nbytes
        largest = rows_splat(np.float32(0))
        for i in range(0, 4 * tokens, 64):
            product = rows_multiply(rows_load(at + i), rows_load(scales + i))
            rows_store(at + i, product)
            largest = rows_larger(largest, product)
        round_row(at, tokens, limit, rows_largest(largest), at, nbytes)


@inner
def _multiply_some(row, factors, count, factor):
    """Row[i] *= factors[i] factor for i < count: what a block holds after its last token may be anything."""
    numbers = carray(float32_pointer(row), (count,))
    by = carray(float32_pointer(factors), (count,))
    for i in range(count):
        numbers[i] *= by[i] * factor


def expand_by_token(code, job, head, tokens, out, scratch):
    """Keys with lanes of tokens as fp32 panels of 16 lanes with scales applied: [block_tokens / 16][key_width][16].

    Tokens from `tokens` on may be anything. out: address of fp32. scratch: address of 128 fp32.
    """
    raise RuntimeError("compiled code only")


@overload(expand_by_token, jit_options=_OPTIONS)
def _expand_by_token(code, job, head, tokens, out, scratch):
    kernel: KvCode = code.code

    def plain(code, job, head, tokens, out, scratch):
        width = job[KEY_WIDTH]
        for panel in range((tokens + 15) // 16):
            target = out + 64 * width * panel
            # A row after an odd last one is overwritten, or lies before the values.
            expand_rows(code, head + job[KEYS] + panel * job[KEY_ROWS] * row_nbytes(code), width, target, 64)
            if has_token_scales(code):
                scales = rows_multiply(rows_load(head + job[KEY_SCALES] + 64 * panel), rows_splat(code_factor(code)))
                for i in range(0, 64 * width, 64):
                    rows_store(target + i, rows_multiply(rows_load(target + i), scales))

    def int4(code, job, head, tokens, out, scratch):
        width = job[KEY_WIDTH]
        for panel in range((tokens + 63) // 64):
            for channel in range(width):
                if channel % 2 == 0:
                    row = panel * job[KEY_ROWS] + channel
                    expand_rows(code, head + job[KEYS] + row * row_nbytes(code), 2, scratch, 256)
                for quarter in range(4):
                    place = 2 * ((2 * panel + quarter // 2) * width + channel)
                    scale, zero = bf16_at(head + job[KEY_SCALES] + place), bf16_at(head + job[KEY_ZEROS] + place)
                    numbers = rows_load(scratch + channel % 2 * 256 + 64 * quarter)
                    target = out + 64 * ((4 * panel + quarter) * width + channel)
                    rows_store(target, rows_add(rows_multiply(numbers, rows_splat(scale)), rows_splat(zero)))

    return int4 if kernel.format == "int4" else plain


def expand_by_channel(code, job, codes, scales, zeros, columns, split, tokens, out, scratch):
    """Values, or keys with lanes of channels, as fp32 panels with scales applied: [columns / 16][block_tokens][16].

    columns: channels as they lie. split: from this channel on, 8-bit formats take the second scale of a token.
    """
    raise RuntimeError("compiled code only")


@overload(expand_by_channel, jit_options=_OPTIONS)
def _expand_by_channel(code, job, codes, scales, zeros, columns, split, tokens, out, scratch):
    kernel: KvCode = code.code

    def plain(code, job, codes, scales, zeros, columns, split, tokens, out, scratch):
        block_tokens = job[BLOCK_TOKENS]
        for panel in range(columns // 16):
            target = out + 64 * block_tokens * panel
            expand_rows(code, codes + panel * block_tokens * row_nbytes(code), tokens, target, 64)
            if has_token_scales(code):
                mine = scales + (4 * block_tokens if 16 * panel >= split else 0)
                for token in range(tokens):
                    factor = rows_splat(float32_at(mine + 4 * token) * code_factor(code))
                    rows_store(target + 64 * token, rows_multiply(rows_load(target + 64 * token), factor))

    def int4(code, job, codes, scales, zeros, columns, split, tokens, out, scratch):
        block_tokens = job[BLOCK_TOKENS]
        for panel in range(columns // 64):
            for token in range(tokens):
                if token % 2 == 0:
                    row = panel * block_tokens + token
                    expand_rows(code, codes + row * row_nbytes(code), 2, scratch, 256)
                for quarter in range(4):
                    place = 2 * ((2 * panel + quarter // 2) * block_tokens + token)
                    scale, zero = bf16_at(scales + place), bf16_at(zeros + place)
                    numbers = rows_load(scratch + token % 2 * 256 + 64 * quarter)
                    target = out + 64 * ((4 * panel + quarter) * block_tokens + token)
                    rows_store(target, rows_add(rows_multiply(numbers, rows_splat(scale)), rows_splat(zero)))

    return int4 if kernel.format == "int4" else plain


@cache
def int4_scores_function() -> int:
    """Address of `key_products` for int4: void(job, head, tokens, queries, rows, out, scratch, ahead), all int64."""
    code = KvCode("int4")

    def scores(job, head, tokens, queries, rows, out, scratch, ahead):
        _int4_scores(
            code, carray(int64_pointer(job), (LAYOUT_FIELDS,)), head, tokens, queries, rows, out, scratch, ahead
        )

    return function_address(scores, 8)


@cache
def int4_values_function() -> int:
    """Address of `add_values` for int4: void(job, head, tokens, weights, rows, out, scratch, ahead), all int64."""
    code = KvCode("int4")

    def values(job, head, tokens, weights, rows, out, scratch, ahead):
        _int4_values(
            code, carray(int64_pointer(job), (LAYOUT_FIELDS,)), head, tokens, weights, rows, out, scratch, ahead
        )

    return function_address(values, 8)


@cache
def expand_function(code: KvCode) -> int:
    """Address of void(job, head, tokens, keys, values, scratch), all int64: a head of a block widened to fp32."""

    def expand(job, head, tokens, keys, values, scratch):
        fields = carray(int64_pointer(job), (LAYOUT_FIELDS,))
        if fields[FROM_KEY]:
            expand_by_channel(code, fields, head + fields[KEYS], head + fields[KEY_SCALES], head + fields[KEY_ZEROS],
                              fields[KEY_COLUMNS], fields[FROM_KEY], tokens, keys, scratch)  # fmt: skip
        else:
            expand_by_token(code, fields, head, tokens, keys, scratch)
            expand_by_channel(code, fields, head + fields[VALUES], head + fields[VALUE_SCALES],
                              head + fields[VALUE_ZEROS], fields[VALUE_COLUMNS], fields[VALUE_COLUMNS], tokens, values,
                              scratch)  # fmt: skip

    return function_address(expand, 6)


@cache
def multiply_int8_function() -> int:
    """Address of `multiply_int8_panels`, its arguments as int64."""
    code = KvCode("int8")

    def multiply(panels, panel_nbytes, count, rows, weights, weights_nbytes, heads, out, out_nbytes, add, ahead):
        multiply_int8_panels(code, panels, panel_nbytes, count, rows, weights, weights_nbytes, heads, out, out_nbytes,
                             add != 0, ahead)  # fmt: skip

    return function_address(multiply, 11)


@cache
def multiply_function(code: KvCode) -> int:
    """Address of `multiply_panels` for a format, its arguments as int64."""

    def multiply(panels, panel_nbytes, count, rows, weights, weights_nbytes, heads, out, out_nbytes, add, ahead):
        multiply_panels(code, panels, panel_nbytes, count, rows, weights, weights_nbytes, heads, out, out_nbytes,
                        add != 0, ahead)  # fmt: skip

    return function_address(multiply, 11)


@cache
def dot_function() -> int:
    """Address of `dot_panels`, its arguments as int64."""
    code = KvCode("fp32")

    def dot(panels, panel_nbytes, count, tokens, queries, query_nbytes, heads, out, out_nbytes):
        dot_panels(code, panels, panel_nbytes, count, tokens, queries, query_nbytes, heads, out, out_nbytes)

    return function_address(dot, 9)
