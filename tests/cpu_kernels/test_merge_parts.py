"""Merged parts against float64, and their bits against the number of threads."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.merge_parts import merge_parts
from cpu_kernels.paged_attention_reference import merge_lse_reference
from cpu_kernels.threads import ThreadPool
from offload.devices.host_threads import kernel_pool


def _parts(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out, lse = torch.randn(shape, generator=generator), 4 * torch.randn(shape[:-1], generator=generator)
    # A part of which a query sees nothing; a query that sees nothing.
    lse[0, 0, 0] = -torch.inf
    lse[-1, :, -1, 0] = -torch.inf
    return out, lse


@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 8), (1, 1, 2, 1, 5), (3, 17, 4, 2, 130), (1, 128, 32, 1, 128)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_against_float64(shape: tuple[int, ...], with_sinks: bool) -> None:
    out, lse = _parts(*shape)
    sinks = torch.linspace(-2, 3, shape[2]) if with_sinks else None
    found = merge_parts(out, lse, sinks, kernel_pool())
    clean = out.masked_fill((lse == -torch.inf)[..., None], 0.0)
    expected = merge_lse_reference([(clean[:, i], lse[:, i]) for i in range(shape[1])], sinks)
    assert (found - expected).abs().max() < 2e-6
    assert not found[-1, -1, 0].any()


def test_bits_do_not_depend_on_threads() -> None:
    out, lse = _parts(2, 40, 16, 2, 96)
    found = []
    for threads in (1, 3):
        pool = ThreadPool(threads)
        found.append(merge_parts(out, lse, None, pool))
        pool.close()
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused() -> None:
    out, lse = _parts(1, 2, 2, 3, 4)
    for bad in ((out, lse[:, :1]), (out.double(), lse), (out.transpose(2, 3), lse.transpose(2, 3))):
        with pytest.raises(ValueError, match="merge_parts: expected"):
            merge_parts(*bad, None, kernel_pool())
    with pytest.raises(ValueError, match="merge_parts: expected"):
        merge_parts(out, lse, torch.zeros(3), kernel_pool())
