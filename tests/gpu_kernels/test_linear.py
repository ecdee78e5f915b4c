"""Quantised linear layers against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.pack import pack_matrix, unpack_matrix
from formats.packed import PACKED_FORMATS, MatrixLayout
from gpu_kernels import linear as module
from gpu_kernels.configs import product_configs
from gpu_kernels.linear import FEW_TOKENS, packed_linear
from gpu_kernels.linear_reference import packed_linear_reference
from tests.assertions import assert_close
from tests.gpu_kernels.bundles import POISON, tolerance_format

FORMATS = tuple(PACKED_FORMATS)


def guarded(payload: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy between poison."""
    storage = torch.full((len(payload) + 256,), POISON, dtype=torch.uint8, device=device)
    inner = storage[128 : 128 + len(payload)]
    inner.copy_(torch.from_numpy(payload))
    return inner


def assert_linear(
    tokens: int, rows: int, columns: int, format: str, dtype: torch.dtype, device: torch.device, *, bias: bool = False
) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes, scales = pack_matrix(torch.randn(rows, columns, generator=generator).numpy(), format)
    layout = MatrixLayout(rows, columns, format)
    # Rows further apart than they are long, with poison between.
    storage = torch.full((tokens, columns + 8), torch.nan, dtype=dtype)
    x = storage[:, :columns].copy_(torch.randn(tokens, columns, generator=generator))
    offset = torch.randn(rows, generator=generator) if bias else None
    config = product_configs(format, dtype.itemsize, few=tokens <= FEW_TOKENS)[0]
    expected = packed_linear_reference(x, codes, scales, layout, offset, rounded=config.scale_weights)
    on_device = storage.to(device)[:, :columns]
    found = packed_linear(
        on_device,
        guarded(codes, device),
        guarded(scales, device),
        layout,
        None if offset is None else offset.to(device),
    )
    assert found.dtype is dtype
    assert_close(found, expected, tolerance_format(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_tokens(format: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_linear(3, 72, 136, format, dtype, device, bias=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_at_every_place_is_exact(format: str, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens of one 1 and else 0 read single weights; with scales of 1 these are their codes' values."""
    layout = MatrixLayout(40, 72, format)
    codes = np.random.default_rng(3).permutation(np.arange(layout.codes_nbytes) % 256).astype(np.uint8)
    if format == "fp8_e4m3":
        codes[(codes & 127) == 127] = 0  # NaN, which nothing is packed to
    one = {"bf16": np.uint16(0x3F80), "e8m0": np.uint8(127), "fp32": np.float32(1.0)}[layout.packed.scale]
    scales = np.full(layout.scales_nbytes // layout.packed.scale_nbytes, one).view(np.uint8)
    expected = torch.from_numpy(unpack_matrix(codes, scales, layout)).T
    on_device = guarded(codes, device), guarded(scales, device)
    for tokens in torch.eye(layout.columns, dtype=dtype, device=device).split(FEW_TOKENS):
        found = packed_linear(tokens, *on_device, layout)
        places = tokens.argmax(1).cpu()
        assert torch.equal(found.cpu().float(), expected[places])


@pytest.mark.parametrize("tokens", range(1, FEW_TOKENS + 1))
def test_every_number_of_few_tokens(tokens: int, device: torch.device) -> None:
    for format in FORMATS:
        assert_linear(tokens, 40, 72, format, torch.bfloat16, device)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_tokens(format: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_linear(FEW_TOKENS + 49, 72, 136, format, dtype, device, bias=format == "int4")


@pytest.mark.parametrize("format", FORMATS)
def test_splits(format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "splits_of", lambda *_: 4)
    assert_linear(1, 40, 328, format, torch.bfloat16, device, bias=True)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 1), (FEW_TOKENS, 16, 64), (2, 17, 65)])
def test_edges(tokens: int, rows: int, columns: int, device: torch.device) -> None:
    for format in FORMATS:
        assert_linear(tokens, rows, columns, format, torch.float32, device)


def test_no_tokens() -> None:
    layout = MatrixLayout(16, 64, "int8")
    codes, scales = (torch.zeros(size, dtype=torch.uint8) for size in (layout.codes_nbytes, layout.scales_nbytes))
    assert packed_linear(torch.zeros(0, 64), codes, scales, layout).shape == (0, 16)


def test_what_does_not_fit_is_refused() -> None:
    layout = MatrixLayout(16, 64, "int8")
    codes, scales = (torch.zeros(size, dtype=torch.uint8) for size in (layout.codes_nbytes, layout.scales_nbytes))
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="x: expected"):
        packed_linear(x[:, :32], codes, scales, layout)
    with pytest.raises(ValueError, match="codes: expected"):
        packed_linear(x, codes[1:], scales, layout)
    with pytest.raises(ValueError, match="scales: expected"):
        packed_linear(x, codes, scales.view(torch.int8), layout)
    with pytest.raises(ValueError, match="bias: expected"):
        packed_linear(x, codes, scales, layout, torch.zeros(15))
    with pytest.raises(ValueError, match="must be on"):
        packed_linear(x, codes.to("meta"), scales, layout)
