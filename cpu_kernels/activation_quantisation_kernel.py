# mypy: allow-untyped-defs
"""Kernel of activation quantisation: rows of numbers to rows of blocks that packed kernels read.

A block stands for 64 columns and has 80 bytes (`bytes_N`), 144 (`words_N`) or 256 (`floats`):

    bytes_N  64 int8 codes | fp32 scale | int32 -N times the sum of codes 0-31 | the same of 32-63 | the same of all
    words_N  128 bytes, for each 4 columns codes 0, 2, 1, 3 as int16 | the rest as above
    floats   64 fp32, the numbers themselves

The sums correct products of weights whose codes are N above their values.

The last block is filled up with zeros.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.activation_quantisation_simd import ROUND, largest_bits, store_bytes, store_words
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.packed_simd import BLOCK_NBYTES, CODE_NBYTES
from cpu_kernels.packed_tiles import bits_of_float32, int8_pointer, int16_pointer, int32_pointer
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_from_bits,
    float32_pointer,
    int64_pointer,
)
from formats.packed import COLUMN_BLOCK

KINDS = {name: number for number, name in enumerate(BLOCK_NBYTES)}
_FLOATS = KINDS["floats"]
_BLOCK_NBYTES = tuple(BLOCK_NBYTES.values())
_CODE_NBYTES = tuple(CODE_NBYTES.values())
_FACTORS = tuple(-int(kind.partition("_")[2] or 0) for kind in BLOCK_NBYTES)

ELEMENT_NUMBERS = {"fp32": 0, "bf16": 1, "fp16": 2}
FP32 = Elements("fp32", "generic")
BF16 = Elements("bf16", "generic")
FP16 = Elements("fp16", "generic")

# Fields of a job.
(
    KIND,
    ELEMENT,  # a number of ELEMENT_NUMBERS
    X,  # address of the first row
    X_ROW_BYTES,
    TOKENS,
    COLUMNS,
    BLOCKS,  # address of the first row of blocks
    TOKENS_PER_CHUNK,
    ROWS,  # address of a table of int64, each token's row of x; 0: row 0 is the first token's, and so on
    JOB_FIELDS,
) = range(10)

_INFINITY_BITS = np.int32(0x7F800000)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
_LARGEST_CODE = np.float32(127)
_SMALLEST_SCALE = np.float32(2.0**-126)
_ROUND = np.float32(ROUND)
_NAN_BITS = np.int32(0x7FC00000)


@inner
def block_nbytes(kind):
    """Bytes of a block of this kind."""
    return _BLOCK_NBYTES[kind]


@inner
def _to_corrections(kind, sums):
    """Sums of codes 0-31 and 32-63 to what a block has."""
    sums[0] *= _FACTORS[kind]
    sums[1] *= _FACTORS[kind]
    sums[2] = sums[0] + sums[1]


@inner
def quantise_block(kind, elements, x_address, count, block_address):
    """One block from `count` elements, 1 to 64.

    amax = max |x|, scale = amax / 127, code = round(x * (1 / scale)), ties to even. A scale below 2**-126 becomes
    zero and so do its codes. Where an x is not finite the scale is NaN, and with it all that the block adds to.
    """
    x = carray(element_pointer(elements, x_address), (count,))
    if kind == _FLOATS:
        copy = carray(float32_pointer(block_address), (COLUMN_BLOCK,))
        for i in range(count):
            copy[i] = element_to_float32(elements, x[i])
        for i in range(count, COLUMN_BLOCK):
            copy[i] = np.float32(0)
        return
    largest = np.int32(0)
    if count == COLUMN_BLOCK:
        largest = largest_bits(elements, x_address)
    else:
        for i in range(count):
            bits = bits_of_float32(element_to_float32(elements, x[i])) & _MAGNITUDE_BITS
            largest = bits if bits > largest else largest
    finite = largest < _INFINITY_BITS
    scale = float32_from_bits(np.int32(largest)) / _LARGEST_CODE
    inverse = np.float32(1) / scale if finite and scale >= _SMALLEST_SCALE else np.float32(0)
    scale = scale if scale >= _SMALLEST_SCALE else np.float32(0)
    tail = block_address + COLUMN_BLOCK * _CODE_NBYTES[kind]
    carray(float32_pointer(tail), (1,))[0] = scale if finite else float32_from_bits(_NAN_BITS)
    sums = carray(int32_pointer(tail + 4), (3,))
    if not finite or inverse == np.float32(0) or count < COLUMN_BLOCK:
        zero = carray(int64_pointer(block_address), (16,))
        for i in range(8 * _CODE_NBYTES[kind]):
            zero[i] = 0
        sums[0] = 0
        sums[1] = 0
        sums[2] = 0
        if not finite or inverse == np.float32(0):
            return
    if count == COLUMN_BLOCK:
        if _CODE_NBYTES[kind] == 1:
            store_bytes(elements, x_address, inverse, block_address, tail + 4)
        else:
            store_words(elements, x_address, inverse, block_address, tail + 4)
        _to_corrections(kind, sums)
        return
    for half in range(2):
        first = 32 * half
        end = min(count, first + 32)
        total = np.int32(0)
        if _CODE_NBYTES[kind] == 1:
            codes = carray(int8_pointer(block_address), (COLUMN_BLOCK,))
            for i in range(first, end):
                code = np.int32((element_to_float32(elements, x[i]) * inverse + _ROUND) - _ROUND)
                codes[i] = np.int8(code)
                total += code
        else:
            words = carray(int16_pointer(block_address), (COLUMN_BLOCK,))
            for i in range(first, end):
                code = np.int32((element_to_float32(elements, x[i]) * inverse + _ROUND) - _ROUND)
                # Columns 0, 1, 2, 3 go to places 0, 2, 1, 3.
                words[(i & ~3) | ((i & 1) << 1) | ((i >> 1) & 1)] = np.int16(code)
                total += code
        sums[half] = total
    _to_corrections(kind, sums)


@inner
def quantise_row(kind, elements, element_nbytes, x_address, columns, blocks_address):
    """A row of `columns` elements to consecutive blocks."""
    for block in range((columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK):
        first = block * COLUMN_BLOCK
        count = min(COLUMN_BLOCK, columns - first)
        target = blocks_address + block * _BLOCK_NBYTES[kind]
        quantise_block(kind, elements, x_address + first * element_nbytes, count, target)


@inner
def _quantise_chunk(with_fp16, job_address, chunk):
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    kind, columns = job[KIND], job[COLUMNS]
    row_nbytes = (columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK * _BLOCK_NBYTES[kind]
    first = chunk * job[TOKENS_PER_CHUNK]
    for token in range(first, min(first + job[TOKENS_PER_CHUNK], job[TOKENS])):
        row = carray(int64_pointer(job[ROWS] + 8 * token), (1,))[0] if job[ROWS] != 0 else token
        x = job[X] + row * job[X_ROW_BYTES]
        blocks = job[BLOCKS] + token * row_nbytes
        if job[ELEMENT] == 0:
            quantise_row(kind, FP32, 4, x, columns, blocks)
        elif job[ELEMENT] == 1:
            quantise_row(kind, BF16, 2, x, columns, blocks)
        elif with_fp16:
            quantise_row(kind, FP16, 2, x, columns, blocks)


@cache
def quantise_task(with_fp16: bool) -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        _quantise_chunk(with_fp16, job, chunk)

    return task_address(task)
