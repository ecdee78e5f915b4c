"""The linear kernel against float64, over edges of shapes, tokens, threads and pools."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.linear import Products, linear
from cpu_kernels.linear_reference import linear_reference
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, poisoned, random

# Fewer columns than a step; a tail; more than one chunk; above and below what one thread takes.
SHAPES = [(1, 1), (7, 33), (100, 64), (130, 1000), (1030, 193), (2048, 768)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 13])
def test_equals_float64(dtype: torch.dtype, rows: int, columns: int, tokens: int) -> None:
    x = poisoned(random((tokens, columns), dtype, 1))
    weight = poisoned(random((rows, columns), dtype, 2, scale=columns**-0.5))
    bias = poisoned(random((rows,), dtype, 3)) if rows % 2 else None
    exact = linear_reference(x, weight, bias)
    absolute = linear_reference(x.abs(), weight.abs(), None if bias is None else bias.abs())
    found = linear(x, weight, bias, kernel_pool())
    assert found.dtype is dtype
    # The bound of `simd`, and half a unit in the last place of the result.
    bound = (columns / 64 + 13) * 2.0**-24 * absolute + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_company(dtype: torch.dtype) -> None:
    x, weight = random((8, 300), dtype, 4), random((700, 300), dtype, 5)
    expected = linear(x, weight, None, shared_pool(1))
    for threads in (2, 3):
        assert torch.equal(linear(x, weight, None, shared_pool(threads)), expected)
    assert torch.equal(linear(x, weight, None, kernel_pool()), expected)
    for token in range(8):
        assert torch.equal(linear(x[token : token + 1], weight, None, kernel_pool()), expected[token : token + 1])


def test_leading_dimensions_stay_and_none_is_fine() -> None:
    weight = random((5, 6), torch.float32, 6)
    assert linear(torch.ones(2, 1, 6), weight, None, kernel_pool()).shape == (2, 1, 5)
    assert linear(torch.ones(0, 6), weight, None, kernel_pool()).shape == (0, 5)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(1, 5), torch.ones(4, 6), None),
        (torch.ones(1, 6), torch.ones(4, 6).bfloat16(), None),
        (torch.ones(6, 2).T, torch.ones(4, 6), None),
        (torch.ones(1, 6), torch.ones(6, 4).T, None),
        (torch.ones(1, 6), torch.ones(4, 6), torch.ones(5)),
        (torch.ones(1, 6, device="meta"), torch.ones(4, 6), None),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="linear: expected contiguous"):
        linear(x, weight, bias, kernel_pool())


def test_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="float64 has no kernel"):
        linear(torch.ones(1, 6).double(), torch.ones(4, 6).double(), None, kernel_pool())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_have_the_bits_of_linear(dtype: torch.dtype) -> None:
    weights = [poisoned(random((rows, 193), dtype, rows)) for rows in (1, 130, 1030)]
    products = Products(weights)
    for seed in range(3):
        x = poisoned(random((1, 193), dtype, 10 + seed))
        products.compute(x, kernel_pool())
        for weight, line in zip(weights, products.found, strict=True):
            expected = linear(x, weight, None, kernel_pool())[0].float()
            assert torch.equal(torch.from_numpy(line[: len(weight)]), expected)


def test_products_outlive_data_that_is_replaced() -> None:
    parameter, x = torch.nn.Parameter(random((4, 6), torch.float32, 1)), random((1, 6), torch.float32, 2)
    products = Products([parameter])
    products.compute(x, kernel_pool())
    before = products.found.copy()
    parameter.data = torch.zeros(1, 1)
    products.compute(x, kernel_pool())
    assert np.array_equal(products.found, before)


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [torch.ones(4)],
        [torch.ones(4, 6), torch.ones(4, 5)],
        [torch.ones(4, 6), torch.ones(4, 6).bfloat16()],
        [torch.ones(6, 4).T],
        [torch.ones(4, 6, device="meta")],
    ],
)
def test_products_refuse_weights(weights: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="Products: expected contiguous weights"):
        Products(weights)


@pytest.mark.parametrize("x", [torch.ones(1, 5), torch.ones(1, 6).bfloat16(), torch.ones(6, 2).T[0], torch.ones(2, 6)])
def test_products_refuse_rows(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Products: expected 6 contiguous"):
        Products([torch.ones(4, 6)]).compute(x, kernel_pool())
