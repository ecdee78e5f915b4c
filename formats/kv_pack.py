"""Packing of KV blocks, in numpy: what the layouts of `formats.kv` hold, and the reference of the compiled packers.

With a the largest magnitude of what shares a scale s, and x one number:

    fp16, bf16   rounded to the nearest, ties to even
    int8         s = a / 127, error at most s / 2
    fp8_e4m3     s = a / 448, error at most max(|x| / 16, s / 1024)
    int4         zero point z = the smallest number, rounded down to bf16; s = (largest - z) / 15, rounded up to bf16;
                 error at most s / 2, and s <= (largest - smallest + |smallest| / 128) / 15 (1 + 1 / 128)

each times 1 + 2^-20 for the arithmetic in fp32. Groups with a (int4: largest - z) below SMALLEST_MAGNITUDE have
scale zero. A number that is not finite makes its scale NaN: it shows in whatever reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.kv import INT4_GROUP, KvLayout
from formats.pack import code_values, nearest_e4m3, round_to_bf16
from formats.packed import E4M3_MAX, SMALLEST_MAGNITUDE

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_Codes = npt.NDArray[Any]


def pack_kv_block(keys: Float32, values: Float32 | None, layout: KvLayout) -> Bytes:
    """One block's bytes.

    Args:
        keys: float32 [kv_heads, tokens, key_width], tokens up to layout.block_tokens; missing ones are zero.
        values: float32 [kv_heads, tokens, value_width]; None where they come from the keys.
        layout: of the block.

    Returns:
        uint8 [layout.nbytes]; padding is zero.

    Raises:
        ValueError: arrays of another type or shape.
    """
    parts = [("key", keys, layout.key_width, layout.key_columns)]
    if not layout.value_from_key:
        if values is None:
            raise ValueError("values: expected an array, found None")
        parts.append(("value", values, layout.value_width, layout.value_columns))
    elif values is not None:
        raise ValueError("values: this layout takes them from the keys, expected None")
    block = np.zeros(layout.nbytes, np.uint8)
    for name, array, width, columns in parts:
        if array.dtype != np.float32 or array.shape != (layout.kv_heads, array.shape[1], width):
            raise ValueError(
                f"{name}s: expected float32 [{layout.kv_heads}, tokens, {width}], found {array.dtype} {array.shape}"
            )
        whole = np.zeros((layout.kv_heads, layout.block_tokens, columns), np.float32)
        whole[:, : array.shape[1], :width] = array
        for head in range(layout.kv_heads):
            for part, stored in _pack(name, whole[head], layout).items():
                place = layout.parts[part]
                start = head * layout.head_nbytes + place.offset
                block[start : start + place.nbytes] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    return block


def unpack_kv_block(block: Bytes, layout: KvLayout) -> tuple[Float32, Float32]:
    """The numbers that a block stands for: keys [kv_heads, block_tokens, key_width], values [..., output_width].

    Raises:
        ValueError: another size or type.
    """
    if block.dtype != np.uint8 or block.shape != (layout.nbytes,):
        raise ValueError(f"block: expected uint8 [{layout.nbytes}], found {block.dtype} {block.shape}")
    heads = [_unpack("key", block[head * layout.head_nbytes :], layout) for head in range(layout.kv_heads)]
    keys = np.stack(heads)
    if layout.value_from_key:
        return keys[..., : layout.key_width], keys[..., : layout.value_from_key]
    heads = [_unpack("value", block[head * layout.head_nbytes :], layout) for head in range(layout.kv_heads)]
    return keys, np.stack(heads)[..., : layout.value_width]


def _channel_lanes(name: str, layout: KvLayout) -> bool:
    return name == "value" or bool(layout.value_from_key)


def _to_panels(rows: _Codes, name: str, layout: KvLayout) -> _Codes:
    """[tokens, columns] → panels [panels, rows, lanes], one code an element."""
    if not _channel_lanes(name, layout):
        panels = rows.reshape(-1, layout.lanes, rows.shape[1]).transpose(0, 2, 1)
        missing = layout.key_rows - rows.shape[1]
        return np.ascontiguousarray(np.pad(panels, ((0, 0), (0, missing), (0, 0))))
    return np.ascontiguousarray(rows.reshape(len(rows), -1, layout.lanes).transpose(1, 0, 2))


def _from_panels(panels: _Codes, name: str, layout: KvLayout) -> Any:
    if not _channel_lanes(name, layout):
        return panels[:, : layout.key_width].transpose(0, 2, 1).reshape(-1, layout.key_width)
    return panels.transpose(1, 0, 2).reshape(panels.shape[1], -1)


def _to_pairs(panels: _Codes) -> _Codes:
    """[panels, rows, ...] → the elements of two rows side by side, in the shape of before."""
    pairs = panels.reshape(len(panels), -1, 2, *panels.shape[2:])
    return np.ascontiguousarray(np.moveaxis(pairs, 2, -1)).reshape(panels.shape)


def _from_pairs(pairs: _Codes) -> Any:
    panels, rows, *lanes = pairs.shape
    return np.moveaxis(pairs.reshape(panels, rows // 2, *lanes, 2), -1, 2).reshape(pairs.shape)


def _pack(name: str, rows: Float32, layout: KvLayout) -> dict[str, _Codes]:
    if layout.is_int4:
        return _pack_int4(name, rows, layout)
    if not layout.is_quantised:
        return {f"{name}s": _to_elements(_to_panels(rows, name, layout), layout.format)}
    largest = E4M3_MAX if layout.format == "fp8_e4m3" else 127.0
    codes, scales = np.empty(rows.shape, np.uint8), []
    split = layout.value_from_key
    for columns in (slice(0, split), slice(split, None)) if split else (slice(None),):
        part = rows[:, columns]
        magnitude = np.abs(part).max(1, initial=0)
        with np.errstate(all="ignore"):
            scale = magnitude * np.float32(1 / largest)
            scale[magnitude < np.float32(SMALLEST_MAGNITUDE)] = 0
            scale[~np.isfinite(magnitude)] = np.nan
            inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
            scaled = part * inverse[:, None]
        bounded = np.clip(np.nan_to_num(scaled), -np.float32(largest), np.float32(largest))
        is_fp8 = layout.format == "fp8_e4m3"
        codes[:, columns] = nearest_e4m3(bounded) if is_fp8 else np.rint(bounded).astype(np.int8).view(np.uint8)
        scales.append(scale)
    panels = _to_panels(codes, name, layout)
    return {f"{name}s": _to_pairs(panels) if layout.has_pairs else panels, f"{name}_scales": np.stack(scales)}


def _pack_int4(name: str, rows: Float32, layout: KvLayout) -> dict[str, _Codes]:
    by_channel = _channel_lanes(name, layout)
    grouped = rows.T if by_channel else rows  # groups run down the first axis
    groups = grouped.reshape(-1, INT4_GROUP, grouped.shape[1])
    # A zero has no sign, whichever of two comes first.
    smallest, largest = groups.min(1) + np.float32(0), groups.max(1)
    with np.errstate(all="ignore"):
        zeros = _bf16_below(smallest)
        spread = largest - zeros
        scales = _bf16_above(spread * np.float32(1 / 15))
        scales[spread < np.float32(SMALLEST_MAGNITUDE)] = 0
        broken = ~np.isfinite(spread)
        scales[broken] = zeros[broken] = np.nan
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
        scaled = np.nan_to_num((groups - zeros[:, None]) * inverse[:, None])
    codes = np.clip(np.rint(scaled), 0, 15).astype(np.uint16).reshape(grouped.shape)
    panels = _to_panels(codes.T if by_channel else codes, name, layout)
    nibbles = panels.reshape(*panels.shape[:2], 2, 4, 8)
    words = np.zeros((*panels.shape[:2], 2, 8), np.uint16)
    for k in range(4):
        words |= nibbles[:, :, :, k] << np.uint16(4 * k)
    return {f"{name}s": _to_pairs(words), f"{name}_scales": bf16_bits(scales), f"{name}_zeros": bf16_bits(zeros)}


def _unpack(name: str, head: Bytes, layout: KvLayout) -> Float32:
    def part(kind: str, dtype: str) -> Any:
        place = layout.parts[f"{name}{kind}"]
        return head[place.offset : place.offset + place.nbytes].view(dtype)

    shape = layout.parts[f"{name}s"].shape
    if layout.is_int4:
        words = _from_pairs(part("s", "<u2").reshape(*shape[:2], 2, 8))[:, :, :, None]
        codes = ((words >> (4 * np.arange(4, dtype=np.uint16))[:, None]) & 15).reshape(shape).astype(np.float32)
        lying = _from_panels(codes, name, layout)
        by_channel = _channel_lanes(name, layout)
        lying = lying.T if by_channel else lying
        grouped = lying.reshape(-1, INT4_GROUP, lying.shape[1])
        scales, zeros = (
            from_bf16_bits(part(kind, "<u2")).reshape(len(grouped), 1, -1) for kind in ("_scales", "_zeros")
        )
        whole: Float32 = (grouped * scales + zeros).reshape(-1, grouped.shape[2])
        return np.ascontiguousarray(whole.T if by_channel else whole)
    if not layout.is_quantised:
        dtype = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2"}[layout.format]
        stored = part("s", dtype).reshape(shape)
        elements = from_bf16_bits(stored) if layout.format == "bf16" else stored.astype(np.float32)
        return np.ascontiguousarray(_from_panels(elements, name, layout), np.float32)
    is_fp8 = layout.format == "fp8_e4m3"
    codes = part("s", "u1" if is_fp8 else "i1").reshape(shape)
    numbers: Float32 = code_values("fp8_e4m3")[codes] if is_fp8 else _from_pairs(codes).astype(np.float32)
    rows: Float32 = _from_panels(numbers, name, layout).copy()
    scales = part("_scales", "<f4").reshape(-1, layout.block_tokens)
    split = layout.value_from_key or rows.shape[1]
    rows[:, :split] *= scales[0][:, None]
    rows[:, split:] *= scales[-1][:, None]
    return rows


def _to_elements(numbers: Float32, format: str) -> _Codes:
    if format == "fp32":
        return numbers
    if format == "fp16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16)
    rounded = np.where(np.isfinite(numbers), round_to_bf16(np.ascontiguousarray(numbers)), numbers)
    return bf16_bits(rounded)


def bf16_bits(values: Float32) -> npt.NDArray[np.uint16]:
    """The bits of fp32 values that are bf16."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16_bits(bits: _Codes) -> Float32:
    """What `bf16_bits` gave, in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bf16_below(values: Float32) -> Float32:
    """The largest bf16 number that is not above."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    kept = bits & np.uint32(0xFFFF0000)
    return (kept + np.where((bits != kept) & (values < 0), np.uint32(0x10000), np.uint32(0))).view(np.float32)


def _bf16_above(values: Float32) -> Float32:
    """The smallest bf16 number that is not below, of numbers that are not negative."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    kept = bits & np.uint32(0xFFFF0000)
    return (kept + np.where(bits != kept, np.uint32(0x10000), np.uint32(0))).view(np.float32)
