"""The sum over a token's experts against float64, in an order that is fixed."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.threads import ThreadPool, shared_pool
from cpu_kernels.weighted_sum import weighted_sum
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import poisoned, random


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 1), (1, 8, 33), (5, 3, 2048), (70, 8, 513), (0, 2, 4)])
def test_equals_float64(tokens: int, top_k: int, hidden: int) -> None:
    outputs = poisoned(random((tokens * top_k, hidden), torch.float32, 1))
    weights = poisoned(random((tokens, top_k), torch.float32, 2))
    found = weighted_sum(outputs, weights, kernel_pool())
    products = weights.double()[..., None] * outputs.double().view(tokens, top_k, hidden)
    assert found.shape == (tokens, hidden)
    assert ((found.double() - products.sum(1)).abs() <= (top_k + 1) * 2.0**-24 * products.abs().sum(1)).all()
    for threads in (1, 3):
        assert torch.equal(weighted_sum(outputs, weights, shared_pool(threads)), found)


def test_what_does_not_fit_is_refused() -> None:
    outputs, weights = torch.ones(6, 4), torch.ones(2, 3)
    for wrong in ((outputs[:5], weights), (outputs.double(), weights), (outputs, torch.ones(3, 2).T)):
        with pytest.raises(ValueError, match="weighted_sum: expected contiguous"):
            weighted_sum(*wrong, kernel_pool())


def test_a_closed_pool_launches_nothing() -> None:
    outputs, weights = torch.ones(6, 4), torch.ones(2, 3)
    with ThreadPool(2) as pool:
        assert torch.equal(weighted_sum(outputs, weights, pool), torch.full((2, 4), 3.0))
    with pytest.raises(RuntimeError, match="closed"):
        weighted_sum(outputs, weights, pool)
