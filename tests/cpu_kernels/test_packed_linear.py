from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cpu_kernels import isa
from cpu_kernels.packed_linear import PackedWeights, packed_linear
from cpu_kernels.packed_reference import packed_linear_reference
from cpu_kernels.threads import shared_pool
from tests.cpu_kernels.packed import FORMATS, Matrix, random_matrix

SHAPES = [
    (1, 1),  # one weight in a tile of padding
    (15, 63),  # below, at and above a tile and a block
    (16, 64),
    (17, 65),
    (48, 128),  # whole tiles, a whole block of fp8 scales
    (130, 200),  # a second row of blocks of fp8 scales
    (300, 1030),  # several chunks
]


def inputs(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def run(matrix: Matrix, x: torch.Tensor, bias: torch.Tensor | None = None, threads: int = 2) -> torch.Tensor:
    """The product, in the middle of an output whose other elements must stay NaN."""
    rows = matrix.layout.rows
    whole = torch.full((len(x) + 2, rows + 5), torch.nan)
    out = whole[1:-1, 2 : 2 + rows]
    packed_linear(x, matrix.weights, out, bias, pool=shared_pool(threads))
    result = out.clone()
    out.fill_(torch.nan)
    assert whole.isnan().all()
    return result


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_shapes_that_hit_the_edges_of_tiles_and_blocks(format: str, rows: int, columns: int) -> None:
    matrix = random_matrix(rows, columns, format)
    x = inputs(5, columns)
    matrix.assert_product(run(matrix, x), x)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [*range(10), 63, 64, 65, 1024])
def test_numbers_of_tokens(format: str, tokens: int) -> None:
    matrix = random_matrix(40, 136, format)
    x = inputs(tokens, 136)
    bias = inputs(1, 40, 2)[0]
    matrix.assert_product(run(matrix, x, bias), x, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_codes_do_not_overflow(format: str) -> None:
    matrix = random_matrix(32, 192, format)
    x = torch.where(inputs(4, 192) > 0, 1.0, -1.0)
    for byte in (0x00, 0x77, 0x7E, 0xF7, 0xFE, 0xFF) if format != "fp8_e4m3" else (0x00, 0x7E, 0xFE):
        if format == "int8" and byte == 0:
            continue  # int8 has no -128
        matrix.codes[:] = byte
        matrix.assert_product(run(matrix, x), x)


def test_every_code_of_every_byte() -> None:
    for format in FORMATS:
        matrix = random_matrix(16, 1024, format)
        codes = np.arange(len(matrix.codes), dtype=np.int64) % 256
        if format == "fp8_e4m3":
            codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        matrix.codes[:] = np.maximum(codes, 1) if format == "int8" else codes
        x = inputs(3, 1024)
        matrix.assert_product(run(matrix, x), x)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(format: str, x_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    matrix = random_matrix(35, 100, format)
    x = inputs(6, 100).to(x_dtype)
    exact = run(matrix, x)
    matrix.assert_product(exact, x)
    out = torch.full((6, 35), torch.nan, dtype=out_dtype)
    packed_linear(x, matrix.weights, out, pool=shared_pool(2))
    assert torch.equal(out, exact.to(out_dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_number_of_threads_and_alone_or_together(format: str) -> None:
    matrix = random_matrix(333, 260, format)
    x = inputs(75, 260)
    together = run(matrix, x, threads=1)
    for threads in (2, 3):
        assert torch.equal(run(matrix, x, threads=threads), together)
    for first, end in [(0, 1), (3, 5), (10, 13), (64, 75)]:
        assert torch.equal(run(matrix, x[first:end]), together[first:end])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_token_alone(format: str, value: float) -> None:
    matrix = random_matrix(20, 130, format)
    x = inputs(3, 130)
    clean = run(matrix, x)
    x[1, 129] = value
    out = run(matrix, x)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-38, 1e-30, 1e30])
def test_tiny_and_huge_activations(format: str, factor: float) -> None:
    matrix = random_matrix(20, 130, format)
    x = inputs(2, 130) * factor
    matrix.assert_product(run(matrix, x), x)


@pytest.mark.parametrize("code", [0, 1, 255])
def test_extreme_scales_of_mxfp4(code: int) -> None:
    matrix = random_matrix(16, 64, "mxfp4")
    matrix.scales[:] = code
    x = inputs(2, 64)
    out = run(matrix, x)
    if code == 255:
        assert out.isnan().all()
    else:
        matrix.scales[:] = 127
        expected = packed_linear_reference(x, matrix.codes, matrix.scales, matrix.layout) * 2.0 ** (code - 127)
        np.testing.assert_allclose(out.double(), expected, rtol=1e-5, atol=2.0**-146)


def test_nan_weights_of_fp8_show() -> None:
    matrix = random_matrix(16, 64, "fp8_e4m3")
    matrix.codes[0] = 0x7F
    out = run(matrix, inputs(2, 64))
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


SCRIPT = """
import sys, torch
from tests.cpu_kernels.packed import FORMATS, random_matrix
from tests.cpu_kernels.test_packed_linear import inputs, run
for format in FORMATS:
    sys.stdout.buffer.write(run(random_matrix(70, 200, format), inputs(15, 200)).numpy().tobytes())
"""


@pytest.mark.parametrize("name", [name for name in isa.ISAS if isa.supports(name)])
def test_every_isa_of_this_machine_gives_the_same_bits(name: str) -> None:
    environment = {**os.environ, isa.ISA_VARIABLE: name}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True)
    expected = [run(random_matrix(70, 200, format), inputs(15, 200)).numpy().tobytes() for format in FORMATS]
    assert done.stdout == b"".join(expected)


def test_no_tokens() -> None:
    matrix = random_matrix(20, 70, "int4")
    assert run(matrix, inputs(0, 70)).shape == (0, 20)


def test_arguments_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix(20, 70, "int4")
    x, out = inputs(2, 70), torch.empty(2, 20)
    for bad_x, bad_out, bias in [
        (x[:, :-1], out, None),
        (x, out[:1], None),
        (x.double(), out, None),
        (x, out.double(), None),
        (inputs(70, 2).T, out, None),
        (x, out, torch.zeros(19)),
        (x, out, torch.zeros(20, dtype=torch.bfloat16)),
    ]:
        with pytest.raises(ValueError, match=r"expected x \[T, 70\], out \[T, 20\]"):
            packed_linear(bad_x, matrix.weights, bad_out, bias)
    short = PackedWeights(torch.zeros(5, dtype=torch.uint8), 0, matrix.layout)
    with pytest.raises(ValueError, match=r"codes: expected contiguous torch.uint8 \(2048,\)"):
        packed_linear(x, short, out)
