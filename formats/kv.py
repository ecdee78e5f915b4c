"""Blocks of a paged KV cache as they lie in memory, in files and under kernels.

A block holds `block_tokens` consecutive tokens of one layer of one sequence: head after head, each with its keys and
values. Matrices lie in panels whose rows are what a kernel adds up over, so that attention reads a block front to back
and neither scores nor outputs need a sum over lanes:

    keys      lanes are tokens:   [block_tokens / 16][key_width][16 tokens]
    values    lanes are channels: [value_columns / 16][block_tokens][16 channels]

int8 and int4 keep rows in pairs, so that what a multiplication of pairs of 16 bits takes lies side by side; a panel of
keys has an even number of rows, the last one zero where key_width is odd:

    int8      16 lanes: [rows / 2][16 lanes][2 rows]
    int4      64 lanes: [rows / 2][2][8 words of 16 bits][2 rows]; lane 32 h + 8 k + i is nibble k of word i of half h

    format     value of a code     scales                                                        bits a number
    fp32 fp16 bf16   itself        none                                                          32, 16, 16
    fp8_e4m3   e4m3fn              fp32, one for a token's keys, one for its values              8.25 at width 128
    int8       -127 to 127         as fp8_e4m3                                                   8.25 at width 128
    int4       0 to 15             bf16 scale and zero point; keys: for 32 tokens of a channel,  5
                                   values: for 32 channels of a token (KIVI, Liu et al., 2024)

A number of int4 is zero + code scale, of fp8_e4m3 and int8 code scale. Scales lie as [tokens], for int4 as
[block_tokens / 32][key_width] of keys and [value_columns / 32][block_tokens] of values.

Latent attention (MLA) has `value_from_key`: the values are the first so many channels of the keys, and nothing of
their own is kept. Keys then have lanes of channels, as values have; fp8_e4m3 and int8 have one scale for a token's
first `value_from_key` channels and one for the others, and int4 groups 32 channels of a token.

Every part starts at a multiple of 64 bytes, and a block is a multiple of 4 KiB, so that it can be read and written with
O_DIRECT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from formats.bundle import BUNDLE_ALIGNMENT_BYTES, COMPONENT_ALIGNMENT_BYTES
from formats.elements import ELEMENT_FORMATS
from formats.packed import round_up

KV_LANES = 16
INT4_LANES = 64
INT4_GROUP = 32
_CODE_BITS = {"fp8_e4m3": 8, "int8": 8, "int4": 4}
KV_FORMATS = (*ELEMENT_FORMATS, *_CODE_BITS)
PAIRED_FORMATS = ("int8", "int4")


@dataclass(frozen=True)
class KvPart:
    """A part of one head of a block.

    Attributes:
        shape: of its elements, as they lie.
        offset: bytes from the head's start.
        nbytes: bytes, without padding after it.
    """

    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class KvLayout:
    """The byte layout of a block.

    Attributes:
        format: one of KV_FORMATS.
        kv_heads: heads of keys and values.
        key_width: channels of a head's key.
        value_width: channels of a head's value; 0 where values come from the keys.
        block_tokens: tokens of a block, a multiple of 16, for int4 of 64.
        value_from_key: the first so many channels of a key are the value; 0 where values are kept.

    Raises:
        ValueError: an unknown format, or numbers that do not fit.
    """

    format: str
    kv_heads: int
    key_width: int
    value_width: int
    block_tokens: int = 64
    value_from_key: int = 0

    def __post_init__(self) -> None:
        if self.format not in KV_FORMATS:
            raise ValueError(f"unknown KV format {self.format!r}; known: {', '.join(KV_FORMATS)}")
        if self.kv_heads <= 0 or self.key_width <= 0:
            raise ValueError(f"a block of {self.kv_heads} heads of {self.key_width} channels holds nothing")
        if self.block_tokens <= 0 or self.block_tokens % self.lanes:
            raise ValueError(f"block_tokens={self.block_tokens}: {self.format} needs a multiple of {self.lanes}")
        if (self.value_width > 0) == (self.value_from_key > 0):
            raise ValueError("either value_width or value_from_key must be positive, not both")
        if self.value_from_key and (
            self.value_from_key > self.key_width or self.value_from_key % (INT4_GROUP if self.is_int4 else KV_LANES)
        ):
            raise ValueError(
                f"value_from_key={self.value_from_key}: expected a multiple of {KV_LANES} ({INT4_GROUP} of int4) up "
                f"to the key's {self.key_width} channels"
            )

    @property
    def is_quantised(self) -> bool:
        """Whether the block holds codes and scales: it is then written whole, by packing."""
        return self.format in _CODE_BITS

    @property
    def is_int4(self) -> bool:
        """Whether codes have four bits and groups with a zero point."""
        return self.format == "int4"

    @property
    def has_pairs(self) -> bool:
        """Whether rows of panels lie in pairs."""
        return self.format in PAIRED_FORMATS

    @property
    def lanes(self) -> int:
        """Lanes of a panel."""
        return INT4_LANES if self.is_int4 else KV_LANES

    @property
    def bits(self) -> int:
        """Bits of an element or a code."""
        return _CODE_BITS[self.format] if self.is_quantised else ELEMENT_FORMATS[self.format].bits

    @property
    def output_width(self) -> int:
        """Channels of a value, wherever it lies."""
        return self.value_from_key or self.value_width

    @cached_property
    def value_columns(self) -> int:
        """Channels of values in whole panels; 0 where they come from the keys."""
        return round_up(self.value_width, self.lanes)

    @cached_property
    def key_rows(self) -> int:
        """Rows of a panel of keys, missing ones of a pair included."""
        if self.value_from_key:
            return self.block_tokens
        return round_up(self.key_width, 2) if self.has_pairs else self.key_width

    @cached_property
    def key_columns(self) -> int:
        """Channels of keys as they lie: whole panels where their lanes are channels."""
        return round_up(self.key_width, self.lanes) if self.value_from_key else self.key_width

    @cached_property
    def parts(self) -> dict[str, KvPart]:
        """The parts of a head by name: keys, key_scales, key_zeros, values, value_scales, value_zeros."""
        parts: dict[str, KvPart] = {}
        end = 0
        for name, shape, bits in self._shapes():
            elements = 1
            for length in shape:
                elements *= length
            offset = round_up(end, COMPONENT_ALIGNMENT_BYTES)
            parts[name] = KvPart(shape, offset, elements * bits // 8)
            end = offset + elements * bits // 8
        return parts

    def _shapes(self) -> list[tuple[str, tuple[int, ...], int]]:
        tokens, lanes = self.block_tokens, self.lanes
        by_channel = bool(self.value_from_key)
        keys = ((self.key_columns if by_channel else tokens) // lanes, self.key_rows, lanes)
        shapes: list[tuple[str, tuple[int, ...], int]] = [("keys", keys, self.bits)]
        if self.is_int4:
            groups = (self.key_columns // INT4_GROUP, tokens) if by_channel else (tokens // INT4_GROUP, self.key_width)
            shapes += [("key_scales", groups, 16), ("key_zeros", groups, 16)]
        elif self.is_quantised:
            shapes += [("key_scales", (2, tokens) if by_channel else (tokens,), 32)]
        if not by_channel:
            shapes += [("values", (self.value_columns // lanes, tokens, lanes), self.bits)]
            groups = (self.value_columns // INT4_GROUP, tokens)
            if self.is_int4:
                shapes += [("value_scales", groups, 16), ("value_zeros", groups, 16)]
            elif self.is_quantised:
                shapes += [("value_scales", (tokens,), 32)]
        return shapes

    @cached_property
    def head_nbytes(self) -> int:
        """Bytes from the start of one head to the start of the next."""
        last = list(self.parts.values())[-1]
        return round_up(last.offset + last.nbytes, COMPONENT_ALIGNMENT_BYTES)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block with padding; a multiple of 4 KiB."""
        return round_up(self.kv_heads * self.head_nbytes, BUNDLE_ALIGNMENT_BYTES)

    @property
    def token_nbytes(self) -> float:
        """Bytes of one token in a full block, scales and padding included."""
        return self.nbytes / self.block_tokens
