"""The order of equals against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.torch_order import orders_as_torch, top_k_as_torch


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (2, 2), (4, 2), (5, 5), (60, 4), (128, 8), (256, 8), (160, 17)])
def test_equals_come_in_torchs_order(count: int, top_k: int) -> None:
    generator = np.random.default_rng(count)
    for kinds in (1, 2, 3, 7, count, 50 * count):
        shares = generator.integers(0, kinds, (200, count)).astype(np.float32)
        # Rising, falling and with infinities, too.
        shares[:3].sort()
        shares[1] = shares[1][::-1]
        shares[2] = np.where(shares[2] > 0, np.inf, -np.inf)
        found = top_k_as_torch(shares, top_k)
        assert found is not None
        assert np.array_equal(found, torch.topk(torch.from_numpy(shares), top_k).indices.numpy())
    assert orders_as_torch(count, top_k)


@pytest.mark.parametrize(("count", "top_k"), [(64, 1), (128, 2), (40, 18)])
def test_where_torch_goes_another_way_there_is_no_answer(count: int, top_k: int) -> None:
    assert top_k_as_torch(np.zeros((2, count), np.float32), top_k) is None
    assert not orders_as_torch(count, top_k)


def test_a_worst_case_of_pivots_has_torchs_answer_or_none() -> None:
    # Musser's "median of three killer": each pivot parts two numbers from the others.
    count = 64
    killer = np.zeros(count, np.float32)
    for i in range(1, count // 2 + 1):
        if i % 2:
            killer[i - 1], killer[i] = i, count // 2 + i
        killer[count // 2 + i - 1] = 2 * i
    for shares in (killer[None], -killer[None], np.sort(killer)[None]):
        found = top_k_as_torch(shares.copy(), 8)
        assert found is None or np.array_equal(found, torch.topk(torch.from_numpy(shares.copy()), 8).indices.numpy())
