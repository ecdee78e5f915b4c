"""The packed formats: quantised weights as they lie in files, in memory and under kernels.

A matrix has `rows` outputs N and `columns` inputs K. Both are padded, rows to 16 and columns to 64. Padding weights
have the code of zero.

Codes lie in tiles of 16 rows. A tile is a sequence of steps of 64 bytes, 4 bytes for each of its 16 rows:

    8 bits: step s holds columns 4 s .. 4 s + 3; byte [row][j] is column 4 s + j.
    4 bits: step s holds columns 8 s .. 8 s + 7; byte [row][j] has column 8 s + j in its low and 8 s + 4 + j in its
            high nibble.

So a vector of 64 bytes has one 32-bit lane for each row: a dot product of bytes with four broadcast activations
serves 16 rows without a sum over lanes, and scales are a vector over rows.

Scales of groups along the columns lie as [N_p / 16][K_p / group][16 rows]; those of fp8_e4m3 belong to blocks of 128 x
128 weights and lie row by row, [ceil(N / 128)][ceil(K / 128)]. A weight is its code's value times its scale.

    format    value of a code                    scale           bits a weight
    int8      code - 128, from -127 to 127       bf16, group 64   8.25
    int4      code - 8, from -8 to 7             bf16, group 32   4.5
    mxfp4     e2m1, sign in bit 3 (OCP MX 1.0)   e8m0, group 32   4.25
    fp8_e4m3  e4m3fn (OCP OFP8 1.0)              fp32, block 128  8.002

int4 has groups of 32 because no choice of scales for 64 columns gets below the error of llama.cpp's q4_0
(docs/performance.md). Its scales may be negative, so that code 0 (-8) can stand for the largest magnitude of either
sign. A bf16 scale widens with a shift on any CPU or GPU and covers the range of every weight; because packing chooses
among rounded scales, fp16 would gain next to nothing. Padding scales: zero, 2^0 for mxfp4, 1.0 for fp8_e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

TILE_ROWS = 16
STEP_BYTES = 64
COLUMN_BLOCK = 64
BLOCK_ROWS = 128

# Bounds on what is packed, and the scales that packing tries: the largest magnitude divided by each of these.
SMALLEST_MAGNITUDE = 2.0**-117
LARGEST_MAGNITUDE = 2.0**127
INT8_DIVISORS = (127.0, 126.5, 127.5, 128.0)
INT4_DIVISORS = (-8.0, -6.75, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -8.75)
E4M3_MAX = 448.0


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class PackedFormat:
    """How quantised weights lie in memory.

    Attributes:
        name: the name used in plans, stores and on the command line.
        bits: bits of one code, 4 or 8.
        group: columns that share a scale.
        scale: element of a scale: bf16, e8m0 or fp32.
        scale_nbytes: bytes of one scale.
        group_rows: rows that share a scale: 1, or BLOCK_ROWS.
        zero_code: the code of weight zero, which padding has.
    """

    name: str
    bits: int
    group: int
    scale: str
    scale_nbytes: int
    group_rows: int
    zero_code: int

    @property
    def step_columns(self) -> int:
        """Columns in a step of 64 bytes."""
        return 32 // self.bits


INT8 = PackedFormat("int8", 8, 64, "bf16", 2, 1, 128)
INT4 = PackedFormat("int4", 4, 32, "bf16", 2, 1, 8)
MXFP4 = PackedFormat("mxfp4", 4, 32, "e8m0", 1, 1, 0)
FP8_E4M3 = PackedFormat("fp8_e4m3", 8, 128, "fp32", 4, BLOCK_ROWS, 0)

PACKED_FORMATS = {packed.name: packed for packed in (INT8, INT4, MXFP4, FP8_E4M3)}


@dataclass(frozen=True)
class MatrixLayout:
    """The byte layout of one packed matrix.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        format: a key of PACKED_FORMATS.
    """

    rows: int
    columns: int
    format: str

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.columns <= 0:
            raise ValueError(f"a matrix of {self.rows} x {self.columns} has no weights")
        if self.format not in PACKED_FORMATS:
            raise ValueError(f"unknown packed format {self.format!r}; known: {', '.join(PACKED_FORMATS)}")

    @property
    def packed(self) -> PackedFormat:
        """The format."""
        return PACKED_FORMATS[self.format]

    @cached_property
    def padded_rows(self) -> int:
        """N_p, rows of whole tiles."""
        return round_up(self.rows, TILE_ROWS)

    @cached_property
    def padded_columns(self) -> int:
        """K_p, columns of whole blocks."""
        return round_up(self.columns, COLUMN_BLOCK)

    @cached_property
    def scales_shape(self) -> tuple[int, ...]:
        """Scales as they lie: [tiles, groups, 16], or [blocks of rows, blocks of columns]."""
        packed = self.packed
        if packed.group_rows > 1:
            return (-(-self.rows // packed.group_rows), -(-self.columns // packed.group))
        return (self.padded_rows // TILE_ROWS, self.padded_columns // packed.group, TILE_ROWS)

    @cached_property
    def codes_nbytes(self) -> int:
        """Bytes of the codes; a multiple of 512."""
        return self.padded_rows * self.padded_columns * self.packed.bits // 8

    @cached_property
    def scales_nbytes(self) -> int:
        """Bytes of the scales."""
        count = 1
        for length in self.scales_shape:
            count *= length
        return count * self.packed.scale_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, without padding between them."""
        return self.codes_nbytes + self.scales_nbytes
