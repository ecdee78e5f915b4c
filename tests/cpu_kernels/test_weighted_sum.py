"""The sum over a token's experts against float64, in an order that is fixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.threads import ThreadPool, shared_pool
from cpu_kernels.weighted_sum import add_weighted, weighted_sum
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


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 1), (3, 2, 511), (9, 4, 1025), (70, 8, 513), (0, 2, 4)])
def test_adding_some_pairs_at_a_time(tokens: int, top_k: int, hidden: int) -> None:
    weights = poisoned(random((tokens, top_k), torch.float32, 2))
    outputs = random((tokens * top_k, hidden), torch.float32, 1)
    rows = np.random.default_rng(0).permutation(tokens * top_k).astype(np.int64)
    sums = poisoned(random((tokens, hidden), torch.float32, 3))
    start = sums.clone()
    for part in np.array_split(rows, 3):
        add_weighted(sums, poisoned(outputs[torch.from_numpy(part)]), weights, part, part // top_k, kernel_pool())
    expected = start.double()
    in_fp32 = start.clone()
    for row in rows.tolist():
        expected[row // top_k] += weights.flatten()[row].double() * outputs[row].double()
        in_fp32[row // top_k] += weights.flatten()[row] * outputs[row]
    assert torch.allclose(sums.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums, in_fp32)
    again = start.clone()
    add_weighted(again, outputs[torch.from_numpy(rows)], weights, rows, rows // top_k, shared_pool(3))
    assert torch.equal(again, sums)


def test_adding_refuses_what_does_not_fit() -> None:
    sums, outputs, weights, index = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 2), np.array([0, 1, 3])
    tokens = np.array([0, 0, 1])
    for wrong in (
        (sums.double(), outputs, weights, index, tokens),
        (sums, outputs[:2], weights, index, tokens),
        (sums, outputs, weights, index + 1, tokens),
        (sums, outputs, weights, index, tokens[:2]),
        (sums, outputs, weights, index, tokens + 1),
        (sums, outputs, weights, index - 1, tokens),
    ):
        with pytest.raises(ValueError, match="add_weighted"):
            add_weighted(*wrong, kernel_pool())
    assert torch.equal(sums, torch.ones(2, 4))
