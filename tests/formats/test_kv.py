"""KV blocks: where parts lie, and what packing loses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from formats.kv import KV_FORMATS, KvLayout
from formats.kv_pack import pack_kv_block, unpack_kv_block

# (kv_heads, key_width, value_width, block_tokens, value_from_key)
SHAPES = [(2, 64, 64, 64, 0), (1, 40, 24, 128, 0), (3, 17, 33, 64, 0), (1, 96, 0, 64, 64), (1, 576, 0, 64, 512)]
SLACK = 1 + 2.0**-19


def layouts() -> list[KvLayout]:
    return [KvLayout(format, *shape) for format in KV_FORMATS for shape in SHAPES]


def numbers(layout: KvLayout, seed: int = 1) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Keys with channels of very different size and offset, as rotated keys have them, and values."""
    generator = np.random.default_rng(seed)
    shape = (layout.kv_heads, layout.block_tokens)
    keys = generator.standard_normal((*shape, layout.key_width)) * np.exp(generator.normal(0, 2, layout.key_width))
    keys += 3 * generator.standard_normal(layout.key_width)
    if layout.value_from_key:
        return keys.astype(np.float32), None
    return keys.astype(np.float32), generator.standard_normal((*shape, layout.value_width)).astype(np.float32)


def bound(x: npt.NDArray[np.float32], layout: KvLayout, keys: bool) -> npt.NDArray[np.float64]:
    """The error that `formats.kv_pack` states for each number of [kv_heads, tokens, width]."""
    x = x.astype(np.float64)
    if layout.format in ("fp32", "fp16", "bf16"):
        return np.abs(x) * {"fp32": 0, "fp16": 2.0**-11, "bf16": 2.0**-8}[layout.format] + 2.0**-25
    if not layout.is_int4:
        split = layout.value_from_key or x.shape[2]
        largest = np.empty_like(x)
        for part in (slice(0, split), slice(split, None)):
            largest[..., part] = np.abs(x[..., part]).max(2, keepdims=True, initial=0)
        if layout.format == "int8":
            return largest / 127 / 2 * SLACK
        return np.maximum(np.abs(x) / 16, largest / 448 / 1024) * SLACK
    axis = 1 if keys and not layout.value_from_key else 2
    x = np.moveaxis(x, axis, -1)
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % 32))], -1).reshape(*x.shape[:-1], -1, 32)
    low, high = padded.min(-1), padded.max(-1)
    step = (high - low + np.abs(low) / 128) / 15 * (1 + 1 / 128)
    return np.moveaxis((step / 2 * SLACK).repeat(32, -1)[..., : x.shape[-1]], -1, axis)


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_errors_are_within_the_stated_bounds(layout: KvLayout) -> None:
    keys, values = numbers(layout)
    found_keys, found_values = unpack_kv_block(pack_kv_block(keys, values, layout), layout)
    assert (np.abs(found_keys - keys.astype(np.float64)) <= bound(keys, layout, True)).all()
    if values is None:
        assert np.array_equal(found_values, found_keys[..., : layout.value_from_key])
    else:
        assert (np.abs(found_values - values.astype(np.float64)) <= bound(values, layout, False)).all()


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_parts_are_aligned_and_do_not_overlap(layout: KvLayout) -> None:
    end = 0
    for part in layout.parts.values():
        assert part.offset % 64 == 0 and part.offset >= end
        end = part.offset + part.nbytes
    assert layout.head_nbytes >= end and layout.head_nbytes % 64 == 0
    assert layout.nbytes % 4096 == 0 and layout.nbytes >= layout.kv_heads * layout.head_nbytes


@pytest.mark.parametrize("format", KV_FORMATS)
def test_missing_tokens_are_zero_and_zero_stays_zero(format: str) -> None:
    layout = KvLayout(format, 2, 48, 32)
    keys, values = numbers(layout)
    assert values is not None
    found_keys, found_values = unpack_kv_block(pack_kv_block(keys[:, :5] * 0, values[:, :5] * 0, layout), layout)
    assert not found_keys.any() and not found_values.any()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_what_is_not_finite_is_not_hidden(format: str) -> None:
    layout = KvLayout(format, 1, 64, 64)
    keys, values = numbers(layout)
    assert values is not None
    keys[0, 3, 7] = np.nan
    values[0, 9, 40] = np.inf
    found_keys, found_values = unpack_kv_block(pack_kv_block(keys, values, layout), layout)
    assert np.isnan(found_keys[0, 3, 7]) and not np.isfinite(found_values[0, 9, 40])
    assert np.isfinite(found_keys[0, 40]).all() and np.isfinite(found_values[0, 8]).all()


def test_bytes_per_number() -> None:
    bits = {format: KvLayout(format, 8, 128, 128).token_nbytes * 8 / (8 * 256) for format in KV_FORMATS}
    assert bits == {"bf16": 16, "fp16": 16, "fp32": 32, "fp8_e4m3": 8.25, "int8": 8.25, "int4": 5}


def test_what_does_not_fit_is_refused() -> None:
    for message, arguments in (
        ("unknown KV format", ("int3", 1, 16, 16)),
        ("multiple of 16", ("bf16", 1, 16, 16, 24)),
        ("multiple of 64", ("int4", 1, 16, 16, 32)),
        ("holds nothing", ("bf16", 0, 16, 16)),
        ("not both", ("bf16", 1, 16, 16, 64, 16)),
        ("not both", ("bf16", 1, 16, 0)),
        ("value_from_key=24", ("bf16", 1, 64, 0, 64, 24)),
    ):
        with pytest.raises(ValueError, match=message):
            KvLayout(*arguments)
    layout = KvLayout("bf16", 1, 16, 16)
    with pytest.raises(ValueError, match="keys: expected float32"):
        pack_kv_block(np.zeros((2, 4, 16), np.float32), np.zeros((2, 4, 16), np.float32), layout)
    with pytest.raises(ValueError, match=r"block: expected uint8 \[4096\]"):
        unpack_kv_block(np.zeros(12, np.uint8), layout)
