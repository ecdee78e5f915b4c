"""Codes and scales of an fp8 checkpoint into packed memory, as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from formats.pack import code_values
from formats.packed import (
    BLOCK_ROWS,
    FP8_E4M3,
    LARGEST_MAGNITUDE,
    SMALLEST_MAGNITUDE,
    TILE_ROWS,
    MatrixLayout,
)
from offload.checkpoint.encoded import EncodedMatrix

_NAN = 127
_SIGN = 128


def can_copy(matrix: EncodedMatrix, layout: MatrixLayout) -> bool:
    """Whether the packed format has the matrix's codes and blocks."""
    block = (FP8_E4M3.group_rows, FP8_E4M3.group)
    return matrix.encoding == "fp8" and layout.format == FP8_E4M3.name and matrix.block == block


def copy_codes(
    matrix: EncodedMatrix, layout: MatrixLayout, codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
) -> None:
    """Lay out codes and scales: every weight has the value that it has in the checkpoint.

    As in whatever is packed, the code of zero has no sign, and blocks whose largest magnitude is below
    SMALLEST_MAGNITUDE become zero.

    Args:
        matrix: for which `can_copy` holds.
        layout: of the packed matrix.
        codes: uint8 [layout.codes_nbytes]; every byte is written.
        scales: uint8 [layout.scales_nbytes], likewise.

    Raises:
        ValueError: a weight is not finite or not below LARGEST_MAGNITUDE; what was written is void.
    """
    stored = matrix.codes.view(torch.uint8).numpy()
    factors = matrix.scales.float().numpy()
    placed = codes.view(np.uint32).reshape(-1, layout.padded_columns // 4, TILE_ROWS)
    taken = scales.view(np.float32).reshape(layout.scales_shape)
    edges = np.arange(0, layout.columns, FP8_E4M3.group)
    values = code_values(FP8_E4M3.name)
    tiles_at_once = BLOCK_ROWS // TILE_ROWS
    for index, row in enumerate(factors):
        part = stored[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS]
        largest = np.maximum.reduceat((part & _NAN).max(0), edges)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            magnitudes = np.abs(values[largest] * row)
        if not (magnitudes < LARGEST_MAGNITUDE).all():
            raise ValueError(
                f"weights: found NaN, infinity or magnitudes of 2^127 and more; {layout.format} needs finite weights"
            )
        live = magnitudes >= np.float32(SMALLEST_MAGNITUDE)
        taken[index] = np.where(live, row, np.float32(1))
        height = min(tiles_at_once, len(placed) - index * tiles_at_once) * TILE_ROWS
        block = np.zeros((height, layout.padded_columns), np.uint8)
        keep = live.repeat(FP8_E4M3.group)[: layout.columns]
        block[: len(part), : layout.columns] = np.where(keep & (part != _SIGN), part, np.uint8(0))
        words: npt.NDArray[Any] = block.view(np.uint32).reshape(-1, TILE_ROWS, layout.padded_columns // 4)
        first = index * tiles_at_once
        placed[first : first + len(words)] = words.transpose(0, 2, 1)
