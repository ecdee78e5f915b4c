"""Shares of attention against softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.shares import add_shares


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_equals_softmax_in_float64(order: tuple[int, int]) -> None:
    lse = 5 * torch.randn(3, 7, 4, 2, generator=torch.Generator().manual_seed(0))
    lse[1, :3] = -torch.inf
    lse[2, :, 1] = -torch.inf
    before = np.arange(21.0).reshape(3, 7)
    roomy = np.zeros((3, 9))
    roomy[:, :7] = before
    # Parts may lie sequence after sequence or part after part.
    lying = lse.transpose(*order).contiguous().transpose(*order)
    add_shares(lying, 2.5, roomy[:, :7])
    expected = torch.softmax(lse.double(), 1).nan_to_num(0.0).sum((2, 3)).numpy()
    assert np.abs(roomy[:, :7] - before - 2.5 * expected).max() < 1e-5
    assert (roomy[:, 7:] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    lse = torch.zeros(2, 3, 4, 2)
    for some, into in ((lse.double(), np.zeros((2, 3))), (lse, np.zeros((2, 4))), (lse.mT, np.zeros((2, 3)))):
        with pytest.raises(ValueError, match="add_shares: expected"):
            add_shares(some, 1.0, into)
