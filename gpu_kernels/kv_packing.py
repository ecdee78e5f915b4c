"""Packing and unpacking of KV blocks on any device, in torch's own operations, with the bytes of `formats.kv_pack`.

A block is packed once for every 64 tokens of a layer, so this need not be as fast as attention; and operations that
are not fused round each step, which the bytes depend on.
"""

from __future__ import annotations

import torch

from formats.kv import INT4_GROUP, KvLayout
from formats.packed import E4M3_MAX, SMALLEST_MAGNITUDE

_HIGH = -0x10000  # the upper 16 bits of 32, as an int32


def pack_blocks(keys: torch.Tensor, values: torch.Tensor | None, layout: KvLayout) -> torch.Tensor:
    """Full blocks' bytes.

    Args:
        keys: fp32 [n, kv_heads, block_tokens, key_width].
        values: fp32 [n, kv_heads, block_tokens, value_width]; None where they come from the keys.
        layout: of the blocks, a quantised one.

    Returns:
        uint8 [n, layout.nbytes], on the device of the keys; padding is zero.

    Raises:
        ValueError: tensors of another type or shape, or a layout that is not quantised.
    """
    if not layout.is_quantised:
        raise ValueError(f"pack_blocks: {layout.format} is not packed")
    if (values is None) != bool(layout.value_from_key):
        raise ValueError(f"values: expected {'None' if layout.value_from_key else 'a tensor'} for {layout}")
    shape = len(keys), layout.kv_heads, layout.block_tokens
    sides = [("key", keys, layout.key_width, layout.key_columns)]
    if values is not None:
        sides.append(("value", values, layout.value_width, layout.value_columns))
    blocks = torch.zeros(len(keys), layout.nbytes, dtype=torch.uint8, device=keys.device)
    heads = blocks[:, : layout.kv_heads * layout.head_nbytes].view(len(keys), layout.kv_heads, layout.head_nbytes)
    for name, numbers, width, columns in sides:
        if numbers.dtype != torch.float32 or numbers.shape != (*shape, width):
            raise ValueError(
                f"{name}s: expected float32 [{len(keys)}, {layout.kv_heads}, {layout.block_tokens}, {width}], found "
                f"{numbers.dtype} {tuple(numbers.shape)}"
            )
        rows = torch.nn.functional.pad(numbers, (0, columns - width)) if columns > width else numbers
        pack = _pack_int4 if layout.is_int4 else _pack_eight_bits
        for kind, stored in pack(rows, layout, by_channel=_channel_lanes(name, layout)).items():
            part = layout.parts[name + kind]
            lying = stored.contiguous().view(torch.uint8).view(len(keys), layout.kv_heads, part.nbytes)
            heads[..., part.offset : part.offset + part.nbytes] = lying
    return blocks


def unpack_blocks(blocks: torch.Tensor, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers that blocks of any format stand for.

    Args:
        blocks: uint8 [n, layout.nbytes], contiguous.
        layout: of the blocks.

    Returns:
        fp32 keys [n, kv_heads, block_tokens, key_width] and values [n, kv_heads, block_tokens, output_width].

    Raises:
        ValueError: another size or type.
    """
    if blocks.dtype != torch.uint8 or blocks.shape != (len(blocks), layout.nbytes) or not blocks.is_contiguous():
        raise ValueError(
            f"blocks: expected contiguous uint8 [n, {layout.nbytes}], found {blocks.dtype} {tuple(blocks.shape)}"
        )
    heads = blocks[:, : layout.kv_heads * layout.head_nbytes].view(len(blocks), layout.kv_heads, layout.head_nbytes)
    keys = _unpack("key", heads, layout)[..., : layout.key_width]
    if layout.value_from_key:
        return keys, keys[..., : layout.value_from_key]
    return keys, _unpack("value", heads, layout)[..., : layout.value_width]


def _split(tensor: torch.Tensor, axis: int, *sizes: int) -> torch.Tensor:
    """An axis as several."""
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


def _channel_lanes(name: str, layout: KvLayout) -> bool:
    return name == "value" or bool(layout.value_from_key)


def _to_panels(rows: torch.Tensor, layout: KvLayout, *, by_channel: bool) -> torch.Tensor:
    """[n, heads, tokens, columns] → panels [n, heads, panels, rows, lanes]."""
    if by_channel:
        return _split(rows, 3, -1, layout.lanes).transpose(2, 3)
    panels = _split(rows, 2, -1, layout.lanes).transpose(3, 4)
    return torch.nn.functional.pad(panels, (0, 0, 0, layout.key_rows - rows.shape[3]))


def _from_panels(panels: torch.Tensor, layout: KvLayout, *, by_channel: bool) -> torch.Tensor:
    if by_channel:
        return panels.transpose(2, 3).flatten(3)
    return panels[:, :, :, : layout.key_width].transpose(3, 4).flatten(2, 3)


def _to_pairs(panels: torch.Tensor) -> torch.Tensor:
    """[n, heads, panels, rows, ...] → the elements of two rows side by side."""
    return _split(panels, 3, -1, 2).movedim(4, -1)


def _from_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """[n, heads, panels, rows / 2, ..., 2] → rows one after the other."""
    return pairs.movedim(-1, 4).flatten(3, 4)


def _pack_eight_bits(rows: torch.Tensor, layout: KvLayout, *, by_channel: bool) -> dict[str, torch.Tensor]:
    largest = E4M3_MAX if layout.format == "fp8_e4m3" else 127.0
    split = layout.value_from_key
    codes, scales = [], []
    for part in (rows[..., :split], rows[..., split:]) if split else (rows,):
        magnitude = part.abs().amax(3) if part.shape[3] else rows.new_zeros(rows.shape[:3])
        scale = magnitude * (1 / largest)
        scale = torch.where(magnitude < SMALLEST_MAGNITUDE, 0.0, scale)
        scale = torch.where(magnitude.isfinite(), scale, torch.nan)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        bounded = (part * inverse[..., None]).nan_to_num().clamp(-largest, largest)
        codes.append(_e4m3(bounded) if layout.format == "fp8_e4m3" else bounded.round().to(torch.int8))
        scales.append(scale)
    panels = _to_panels(torch.cat(codes, 3), layout, by_channel=by_channel)
    return {"s": _to_pairs(panels) if layout.has_pairs else panels, "_scales": torch.stack(scales, 2)}


def _e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """Codes uint8 of the nearest e4m3 numbers, ties to even, of magnitudes up to 448; zero has no sign."""
    bits = numbers.view(torch.int32) & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = torch.where(bits >= 121 << 23, normal, (numbers.abs() * 512).round().to(torch.int32))
    return torch.where((numbers < 0) & (code > 0), code | 0x80, code).to(torch.uint8)


def _pack_int4(rows: torch.Tensor, layout: KvLayout, *, by_channel: bool) -> dict[str, torch.Tensor]:
    lying = rows.transpose(2, 3) if by_channel else rows
    groups = _split(lying, 2, -1, INT4_GROUP)
    # A zero has no sign, whichever of two comes first.
    smallest, largest = groups.amin(3) + 0.0, groups.amax(3)
    bits = smallest.view(torch.int32)
    kept = bits & _HIGH
    zeros = (kept + torch.where((bits != kept) & (smallest < 0), 0x10000, 0).to(torch.int32)).view(torch.float32)
    spread = largest - zeros
    bits = (spread * (1 / 15)).view(torch.int32)
    kept = bits & _HIGH
    scales = (kept + torch.where(bits != kept, 0x10000, 0).to(torch.int32)).view(torch.float32)
    scales = torch.where(spread < SMALLEST_MAGNITUDE, 0.0, scales)
    scales, zeros = (torch.where(spread.isfinite(), one, torch.nan) for one in (scales, zeros))
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    scaled = ((groups - zeros[:, :, :, None]) * inverse[:, :, :, None]).nan_to_num()
    codes = scaled.round().clamp(0, 15).to(torch.int32).flatten(2, 3)
    panels = _to_panels(codes.transpose(2, 3) if by_channel else codes, layout, by_channel=by_channel)
    nibbles = _split(panels, 4, 2, 4, 8)
    words = nibbles[..., 0, :].clone()
    for place in range(1, 4):
        words |= nibbles[..., place, :] << (4 * place)
    upper = [(one.view(torch.int32) >> 16).to(torch.int16) for one in (scales, zeros)]
    return {"s": _to_pairs(words.to(torch.int16)), "_scales": upper[0], "_zeros": upper[1]}


def _unpack(name: str, heads: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    by_channel = _channel_lanes(name, layout)

    def part(kind: str, dtype: torch.dtype) -> torch.Tensor:
        place = layout.parts[name + kind]
        return heads[..., place.offset : place.offset + place.nbytes].contiguous().view(dtype)

    panels, rows, lanes = layout.parts[f"{name}s"].shape
    if layout.is_int4:
        words = _from_pairs(_split(part("s", torch.int16), 2, panels, rows // 2, 2, 8, 2))
        places = 4 * torch.arange(4, device=heads.device, dtype=torch.int32)[:, None]
        codes = ((words.to(torch.int32)[..., None, :] >> places) & 15).flatten(4).float()
        lying = _from_panels(codes, layout, by_channel=by_channel)
        lying = lying.transpose(2, 3) if by_channel else lying
        groups = _split(lying, 2, -1, INT4_GROUP)
        scales, zeros = (
            _split(part(kind, torch.bfloat16).float(), 2, groups.shape[2], 1, -1) for kind in ("_scales", "_zeros")
        )
        whole = (groups * scales + zeros).flatten(2, 3)
        return whole.transpose(2, 3) if by_channel else whole
    if not layout.is_quantised:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[layout.format]
        elements = _split(part("s", dtype), 2, panels, rows, lanes).float()
        return _from_panels(elements, layout, by_channel=by_channel)
    if layout.format == "fp8_e4m3":
        numbers = _split(part("s", torch.float8_e4m3fn).float(), 2, panels, rows, lanes)
    else:
        numbers = _from_pairs(_split(part("s", torch.int8), 2, panels, rows // 2, lanes, 2)).float()
    lying = _from_panels(numbers, layout, by_channel=by_channel)
    scales = _split(part("_scales", torch.float32), 2, -1, layout.block_tokens)
    split = layout.value_from_key or lying.shape[3]
    return torch.cat([lying[..., :split] * scales[:, :, 0, :, None], lying[..., split:] * scales[:, :, -1, :, None]], 3)
