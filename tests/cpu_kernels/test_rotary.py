"""The rotary kernel has the bits of tensor operations."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.rotary import rotary
from cpu_kernels.rotary_reference import rotary_reference
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, poisoned, random


def _heads(batch: int, heads: int, positions: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[B, H, T, D] as projections give it: a transposed view."""
    return poisoned(random((batch, positions, heads, width), dtype, seed)).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("batch", "angles_batch", "positions", "width", "pairs"),
    [(1, 1, 1, 128, 64), (2, 1, 5, 20, 6), (3, 3, 2, 2, 1), (2, 2, 700, 34, 16)],
)
def test_has_the_bits_of_tensor_operations(
    dtype: torch.dtype, shared: bool, batch: int, angles_batch: int, positions: int, width: int, pairs: int
) -> None:
    q, k = (_heads(batch, heads, positions, width, dtype, heads) for heads in (4, 3))
    shape = (angles_batch, positions, pairs if shared else 2 * pairs)
    cos, sin = poisoned(random(shape, dtype, 8)), poisoned(random(shape, dtype, 9))
    for pool in (kernel_pool(), shared_pool(3)):
        found = rotary(q, k, cos, sin, shared_angles=shared, pool=pool)
        for rotated, source in zip(found, (q, k), strict=True):
            assert torch.equal(rotated, rotary_reference(source, cos, sin, shared_angles=shared))


def test_what_does_not_fit_is_refused() -> None:
    q, cos = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8)
    wrong = [
        (q, torch.ones(1, 2, 4, 8), cos, cos),
        (q, q, cos, torch.ones(1, 3, 6)),
        (q, q, torch.ones(1, 3, 10), torch.ones(1, 3, 10)),
        (q, q.bfloat16(), cos, cos),
        (q.transpose(2, 3), q.transpose(2, 3), torch.ones(1, 8, 2), torch.ones(1, 8, 2)),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="rotary: expected"):
            rotary(*arguments, shared_angles=False, pool=kernel_pool())
