"""The weighted sum against float64."""

from __future__ import annotations

import pytest
import torch

from gpu_kernels.combine import combine
from gpu_kernels.combine_reference import combine_reference
from tests.assertions import assert_close
from tests.gpu_kernels.bundles import tolerance_format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "top_k", "hidden", "splits"), [(3, 2, 513, 1), (1, 1, 512, 4), (2, 8, 7, 2)])
def test_sum(tokens: int, top_k: int, hidden: int, splits: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(splits, tokens * top_k, hidden, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    base = torch.randn(tokens, hidden, generator=generator)
    if top_k > 1:
        weights[-1, 0] = 0.0
        rows[:, (tokens - 1) * top_k] = torch.nan
    for beside in (None, base):
        out = torch.full((tokens, hidden), torch.nan, dtype=dtype, device=device)
        found = combine(rows.to(device), weights.to(device), out, None if beside is None else beside.to(device))
        assert found is out
        assert_close(out, combine_reference(rows, weights, beside), tolerance_format(dtype))


def test_what_does_not_fit_is_refused() -> None:
    rows, weights, out = torch.zeros(1, 4, 8), torch.zeros(2, 2), torch.zeros(2, 8)
    wrong = [
        (rows.half(), weights, out, None),
        (rows, weights.double(), out, None),
        (rows[:, :3], weights, out, None),
        (rows, weights, out[:, :4], None),
        (rows, weights, torch.zeros(8, 2).T, None),
        (rows, weights, out, out.half()),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="combine: expected"):
            combine(*arguments)
