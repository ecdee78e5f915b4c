"""Sketches of keys: one bit of each number, so that a block's scores can be estimated without its keys.

Key t of a block is taken for

    middle_c + factor_t * (spread_c or -spread_c)

in channel c, where middle_c lies halfway between the block's smallest and largest number of the channel, the sign is
that of key - middle, spread_c is the mean of |key - middle| over the tokens, and factor_t the one that leaves the least
squared error of the token's key. Each block has middles and spreads of its own. What else was tried: docs/kv.md.

A head's sketch, all numbers little endian, channels padded with zeros to a multiple of 64 (C), tokens by repeating the
last to a multiple of 64:

    bf16 [C]                 middles
    bf16 [C]                 spreads
    of each 64 tokens:
    bf16 [64]                factors; that of token t is number 32 (t // 32) + 16 (t % 2) + t % 32 // 2
    uint8 [C / 64][16][32]   signs, 1 for plus. Byte j of row 2 r + s has tokens j (low nibble) and 32 + j (high), bit i
                             of a nibble is channel 16 i + r + 8 s of the 64

so that a nibble is a place in a table of the 16 sums of four channels, and what 32 bytes look up in two such tables
adds up without a lane being moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats.kv_pack import bf16_bits, from_bf16_bits
from formats.pack import round_to_bf16
from formats.packed import round_up

SKETCH_CHANNELS = 64
SKETCH_TOKENS = 64

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SketchLayout:
    """Where what lies in the sketch of a block of one head.

    Attributes:
        width: channels of a key.
        block_tokens: of a block.
    """

    width: int
    block_tokens: int

    @property
    def columns(self) -> int:
        """Channels, padding included."""
        return round_up(self.width, SKETCH_CHANNELS)

    @property
    def runs(self) -> int:
        """How often 64 tokens, padding included."""
        return round_up(self.block_tokens, SKETCH_TOKENS) // SKETCH_TOKENS

    @property
    def run_nbytes(self) -> int:
        """Bytes of factors and signs of 64 tokens."""
        return SKETCH_TOKENS * (2 + self.columns // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of a sketch, a multiple of 64."""
        return 4 * self.columns + self.runs * self.run_nbytes


def sketch_keys(keys: Float32, layout: SketchLayout) -> Bytes:
    """The sketch of a block's keys: the reference of the compiled one.

    Args:
        keys: float32 [block_tokens, width].
        layout: of the sketch.

    Returns:
        uint8 [layout.nbytes].
    """
    padded = np.zeros((layout.runs * SKETCH_TOKENS, layout.columns), np.float32)
    padded[: len(keys), : layout.width] = keys
    padded[len(keys) :] = padded[len(keys) - 1]
    lowest, highest = padded.min(0), padded.max(0)
    middles = round_to_bf16((lowest + highest) * np.float32(0.5))
    away = np.abs(padded - middles)
    spreads = round_to_bf16(away[: len(keys)].sum(0, dtype=np.float64).astype(np.float32) / np.float32(len(keys)))
    squares = (spreads.astype(np.float64) ** 2).sum()
    factors = away.astype(np.float64) @ spreads.astype(np.float64) / (squares if squares > 0 else 1)
    signs = (padded > middles).reshape(layout.runs, 2, 32, -1, 4, 2, 8)
    # [runs, panels, r, s, j, half, bit]
    bits = np.packbits(signs.transpose(0, 3, 6, 5, 2, 1, 4).reshape(-1, 8), axis=1, bitorder="little")
    ordered = round_to_bf16(factors.astype(np.float32)).reshape(layout.runs, 2, 16, 2).transpose(0, 1, 3, 2)
    parts = [_bf16(middles), _bf16(spreads)]
    for run, some in enumerate(bits.reshape(layout.runs, -1)):
        parts += [_bf16(ordered[run]), some]
    return np.concatenate(parts)


def sketched_keys(sketch: Bytes, layout: SketchLayout) -> tuple[Float32, Float32, Float32]:
    """What a sketch holds.

    Args:
        sketch: uint8 [layout.nbytes].
        layout: of it.

    Returns:
        middles float32 [width], deviations (spread times sign) float32 [block_tokens, width], factors [block_tokens].
    """
    columns = layout.columns
    middles, spreads = (_from_bf16(sketch[2 * columns * part : 2 * columns * (part + 1)]) for part in range(2))
    runs = sketch[4 * columns :].reshape(layout.runs, layout.run_nbytes)
    factors = _from_bf16(runs[:, : 2 * SKETCH_TOKENS]).reshape(-1, 2, 2, 16).transpose(0, 1, 3, 2).reshape(-1)
    bits = np.unpackbits(runs[:, 2 * SKETCH_TOKENS :], bitorder="little")
    signs = bits.reshape(layout.runs, columns // 64, 8, 2, 32, 2, 4).transpose(0, 5, 4, 1, 6, 3, 2)
    plus = signs.reshape(-1, columns) != 0
    tokens = slice(layout.block_tokens)
    deviations = np.where(plus, spreads, -spreads)
    return middles[: layout.width], deviations[tokens, : layout.width], factors[tokens]


def _bf16(numbers: Float32) -> Bytes:
    """The bytes of numbers that are bf16."""
    return bf16_bits(numbers.reshape(-1)).astype("<u2", copy=False).view(np.uint8)


def _from_bf16(stored: Bytes) -> Float32:
    return from_bf16_bits(np.ascontiguousarray(stored).view("<u2"))
