"""The normalisation kernel against float64 and against transformers' own modules."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.rms_norm import FORMS, Form, rms_norm
from cpu_kernels.rms_norm_reference import rms_norm_reference
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, poisoned, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1, 33), (2, 3, 128), (300, 1000)])
def test_equals_float64(dtype: torch.dtype, form: Form, shape: tuple[int, ...]) -> None:
    x = random(shape, dtype, 1) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1)).to(dtype)
    x, weight = poisoned(x), poisoned(random(shape[-1:], dtype, 2))
    found = rms_norm(x, weight, 1e-6, form, kernel_pool())
    exact = rms_norm_reference(x, weight, 1e-6, form)
    # A sum in fp32 may round the scaled value to its other neighbour, which then is multiplied.
    steps = 2.0 if form == "rounded" else 0.5
    bound = exact.abs() * (steps * torch.finfo(dtype).eps + (shape[-1] / 64 + 20) * 2.0**-24) + 1e-7
    assert found.dtype is dtype
    assert ((found.double() - exact).abs() <= bound).all()


def test_bits_do_not_depend_on_threads_or_other_rows() -> None:
    x, weight = random((500, 513), torch.bfloat16, 3), random((513,), torch.bfloat16, 4)
    expected = rms_norm(x, weight, 1e-5, "rounded", shared_pool(1))
    assert torch.equal(rms_norm(x, weight, 1e-5, "rounded", shared_pool(3)), expected)
    assert torch.equal(rms_norm(x, weight, 1e-5, "rounded", kernel_pool()), expected)
    assert torch.equal(rms_norm(x[7], weight, 1e-5, "rounded", kernel_pool()), expected[7])


def test_a_nan_spoils_its_row_alone() -> None:
    x = torch.ones(3, 40)
    x[1, 5] = torch.nan
    found = rms_norm(x, torch.ones(40), 1e-6, "plain", kernel_pool())
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(2, 6), torch.ones(6)
    for wrong in ((torch.ones(2, 5), weight), (x.bfloat16(), weight), (torch.ones(6, 2).T, weight)):
        with pytest.raises(ValueError, match="rms_norm: expected contiguous"):
            rms_norm(*wrong, 1e-6, "plain", kernel_pool())
    with pytest.raises(ValueError, match="form"):
        rms_norm(x, weight, 1e-6, "other", kernel_pool())  # type: ignore[arg-type]
