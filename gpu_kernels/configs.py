"""Tile sizes: a few for each kind of product, the best guess first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from formats.packed import PACKED_FORMATS
from gpu_kernels.launch import Threads


@dataclass(frozen=True)
class ProductConfig:
    """How a (grouped) matrix product with weights is cut up.

    Attributes:
        tokens: rows of activations in a tile: at least 16, of packed formats that do not scale weights at least 8.
        rows: weight rows in a tile, a multiple of 16 that divides 128 or is 128.
        columns: columns multiplied at a time.
        scale_weights: see `weights_kernel.multiply_add`.
        threads: of one program.
    """

    tokens: int
    rows: int
    columns: int
    scale_weights: bool
    threads: Threads


@cache
def product_configs(format: str, itemsize: int, *, few: bool) -> tuple[ProductConfig, ...]:
    """The candidates for a weight format, best guess first.

    Few tokens: memory-bound, so narrow tiles for many programs, and many loads under way. Many tokens: as large as
    registers allow. Shared memory stays below the 99 KiB of consumer cards.

    Args:
        format: of the weights.
        itemsize: bytes of an activation.
        few: tiles of 8 or 16 tokens.
    """
    if few:
        columns = _columns_of_few(format, itemsize)
        # Weights of packed formats are a product's first operand, and each warp takes 16 rows or more of its own: with
        # fewer instructions for a weight the more rows a warp has. Warpgroups (four warps on 64 rows) would take
        # activations from shared memory in another order of columns.
        packed = format in PACKED_FORMATS
        sizes_of_few = ((64, 2, 4), (32, 2, 5)) if packed else ((32, 4, 4), (64, 4, 3), (32, 2, 4))
        if format == "fp32":
            # Two warps would spill on sm_120.
            sizes_of_few = sizes_of_few[:2]
        return tuple(
            ProductConfig(8 if packed else 16, rows, columns, False, Threads(warps, stages))
            for rows, warps, stages in sizes_of_few
        )
    columns = 32 if itemsize == 4 else 64
    # (tokens, rows, warps, stages). Sums of blocks before they are scaled take registers as the sums themselves do.
    sizes: tuple[tuple[int, int, int, int], ...]
    if itemsize == 4 and format in PACKED_FORMATS:
        # Larger ones spill on some cards.
        sizes = ((32, 32, 4, 2),) if format == "int8" else ((32, 64, 8, 2),)
    elif itemsize == 4:
        sizes = ((32, 64, 8, 2), (64, 64, 8, 2))
    elif format == "fp8_e4m3":
        sizes = ((64, 64, 8, 3),)
    elif format == "mxfp4":
        # With gates, of other tiles it is not known that they do not spill on sm_80 to 89.
        sizes = ((64, 128, 8, 3),)
    elif format == "int8":
        # Others spill a few registers on sm_80 to 89, here and in int4.
        sizes = ((64, 64, 4, 3), (128, 64, 8, 3))
    elif format == "int4":
        sizes = ((64, 64, 4, 3), (64, 128, 8, 3))
    else:
        sizes = ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3))
    # A scale of int8 is one of 64 columns, more than registers hold of fp32's blocks beside the scaled ones.
    scale_weights = format in PACKED_FORMATS and not (format == "int8" and itemsize == 4)
    return tuple(
        ProductConfig(tokens, rows, columns, scale_weights, Threads(warps, stages))
        for tokens, rows, warps, stages in sizes
    )


def _columns_of_few(format: str, itemsize: int) -> int:
    """The columns of one scale, or of one tile where these are no limit; fewer where blocks of fp32 would spill."""
    if format in ("int4", "mxfp4") or (format in PACKED_FORMATS and itemsize == 4):
        return 32
    if format in ("int8", "fp8_e4m3", "fp32"):
        return 64
    return 128 if itemsize == 2 else 64


def splits_of(programs: int, warps: int, steps: int, processors: int) -> int:
    """Parts to cut the columns into so that eight warps run on each processor; a power of two, at most 8.

    Args:
        programs: without splitting.
        warps: of a program.
        steps: iterations along the columns; each part has at least four.
        processors: of the device.
    """
    splits = 1
    while splits < 8 and programs * warps * splits < 8 * processors and steps // (splits * 2) >= 4:
        splits *= 2
    return splits
