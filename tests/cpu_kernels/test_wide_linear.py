import pytest
import torch

from cpu_kernels import wide_linear
from cpu_kernels.threads import shared_pool
from cpu_kernels.wide_linear import linear_many, multiplies_natively

EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def way(request, monkeypatch):
    monkeypatch.setattr(wide_linear, "multiplies_natively", lambda dtype: request.param or dtype is torch.float32)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 50), (0, 8, 8), (129, 64, 33), (5, 1, 1)], ids=str)
def test_equals_float64(way, dtype, with_bias, shape):
    tokens, columns, rows = shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    found = linear_many(x, weight, bias, shared_pool(2))
    assert found.dtype is dtype
    assert found.shape == (tokens, rows)
    # Torch's own product may round 16-bit partial sums; the widened one rounds once.
    assert ((found.double() - exact).abs() <= EPSILON[dtype] * size + 1e-6).all()


def test_any_leading_shape_and_strided_rows(way):
    x = torch.randn(2, 3, 16).bfloat16().transpose(0, 1)
    weight = torch.randn(5, 16).bfloat16()
    exact = (x.double() @ weight.double().T).to(torch.bfloat16)
    found = linear_many(x, weight, None, shared_pool(2))
    assert found.shape == (3, 2, 5)
    torch.testing.assert_close(found, exact, rtol=2.0**-6, atol=2.0**-6)


def test_fp32_is_native():
    assert multiplies_natively(torch.float32)
    assert isinstance(multiplies_natively(torch.bfloat16), bool)
    assert isinstance(multiplies_natively(torch.float16), bool)
