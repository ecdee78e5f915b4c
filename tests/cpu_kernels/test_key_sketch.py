"""Sketches by the compiled kernel and estimates from them, against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels import key_sketch
from cpu_kernels.key_sketch import estimate_largest_scores, sketch_blocks
from cpu_kernels.key_sketch_kernel import scores_task
from cpu_kernels.key_sketch_reference import largest_scores_reference
from cpu_kernels.key_sketch_simd import SumsShape
from cpu_kernels.threads import shared_pool
from formats.key_sketch import SketchLayout, sketch_keys
from offload.devices.host_threads import kernel_pool

BATCH, KV_HEADS, BLOCKS = 2, 2, 5
# Width, tokens of a block, query heads of a key-value head, new tokens.
SHAPES = [(64, 64, 1, 1), (128, 64, 8, 1), (128, 64, 4, 3), (48, 16, 3, 1), (576, 128, 16, 1)]


def _keys(width: int, tokens: int) -> torch.Tensor:
    """[B, Hk, C, tokens, width]; a channel is the same everywhere, and so is a block."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(BATCH, KV_HEADS, BLOCKS, tokens, width, generator=generator)
    keys += torch.randn(BATCH, KV_HEADS, 1, 1, width, generator=generator)
    keys[..., 3] = 1.5
    keys[:, :, 2] = keys[:, :, 2, :1]
    return keys


def _sketches(keys: torch.Tensor, layout: SketchLayout) -> torch.Tensor:
    rows = [
        [sketch_blocks(keys[row, :, block].contiguous(), layout) for block in range(BLOCKS)] for row in range(BATCH)
    ]
    return torch.stack([torch.stack(row, 1) for row in rows])


@pytest.mark.parametrize(("width", "tokens", "group", "new"), SHAPES)
def test_equal_the_references(width: int, tokens: int, group: int, new: int) -> None:
    layout, keys = SketchLayout(width, tokens), _keys(width, tokens)
    sketches = _sketches(keys, layout)
    wanted = np.stack([sketch_keys(one.numpy(), layout) for one in keys.reshape(-1, tokens, width)])
    # A factor's sum may be rounded the other way.
    assert (sketches.reshape(-1, layout.nbytes).numpy() != wanted).sum() <= 2
    query = torch.randn(BATCH, KV_HEADS * group, new, width, generator=torch.Generator().manual_seed(1))
    expected = largest_scores_reference(query, sketches, layout)
    found = estimate_largest_scores(query, sketches, layout, kernel_pool())
    assert found.shape == (BATCH, KV_HEADS, BLOCKS) and found.dtype is torch.float32
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert torch.equal(estimate_largest_scores(query, sketches, layout, shared_pool(1)), found)
    exact = query.reshape(BATCH, KV_HEADS, 1, -1, width) @ keys.mT
    near = np.corrcoef(found.numpy().ravel(), exact.amax((3, 4)).numpy().ravel())[0, 1]
    assert near > 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_16_bits_and_sketches_with_room_between_heads(dtype: torch.dtype) -> None:
    layout = SketchLayout(128, 64)
    sketches = _sketches(_keys(128, 64), layout)
    query = torch.randn(BATCH, KV_HEADS * 2, 1, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    roomy = torch.full((BATCH, KV_HEADS, BLOCKS + 3, layout.nbytes), 255, dtype=torch.uint8)
    roomy[:, :, :BLOCKS] = sketches
    found = estimate_largest_scores(query, roomy[:, :, :BLOCKS], layout, kernel_pool())
    assert torch.equal(found, estimate_largest_scores(query.float(), sketches, layout, kernel_pool()))


def test_without_shuffles_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SketchLayout(128, 64)
    sketches = _sketches(_keys(128, 64), layout)
    query = torch.randn(BATCH, KV_HEADS * 3, 1, 128, generator=torch.Generator().manual_seed(1))
    found = estimate_largest_scores(query, sketches, layout, kernel_pool())
    plain = scores_task(SumsShape(1, shuffles=False), SumsShape(2, shuffles=False))
    monkeypatch.setattr(key_sketch, "_task", lambda: plain)
    assert torch.equal(estimate_largest_scores(query, sketches, layout, kernel_pool()), found)


def test_a_query_of_zeros_scores_zero_and_a_nan_is_kept() -> None:
    layout = SketchLayout(64, 64)
    sketches = _sketches(_keys(64, 64), layout)
    query = torch.zeros(BATCH, KV_HEADS, 1, 64)
    assert (estimate_largest_scores(query, sketches, layout, kernel_pool()) == 0).all()
    query[0, 1, 0, 9] = torch.nan
    found = estimate_largest_scores(query, sketches, layout, kernel_pool())
    assert found[0, 1].isnan().all() and not found[1].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    layout = SketchLayout(64, 64)
    with pytest.raises(ValueError, match=r"sketch_blocks: expected contiguous fp32 \[heads, 64, 64\]"):
        sketch_blocks(torch.zeros(2, 16, 64), layout)
    sketches = torch.zeros(1, 2, 3, layout.nbytes, dtype=torch.uint8)
    for query, some in (
        (torch.zeros(1, 3, 1, 64), sketches),
        (torch.zeros(1, 2, 1, 48), sketches),
        (torch.zeros(1, 2, 1, 64), sketches[..., :-64]),
        (torch.zeros(1, 2, 1, 64), sketches.float()),
    ):
        with pytest.raises(ValueError, match="estimate_largest_scores: expected query"):
            estimate_largest_scores(query, some, layout, kernel_pool())
