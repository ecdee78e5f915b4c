from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels import activation_quantisation_kernel as kernel
from cpu_kernels.packed_reference import quantise
from cpu_kernels.packed_simd import BLOCK_NBYTES
from cpu_kernels.threads import shared_pool

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run(x: torch.Tensor, kind: str) -> np.ndarray:
    """Blocks as uint8 [T, blocks, nbytes of a block], with guards around them checked."""
    blocks = -(-x.shape[1] // 64)
    nbytes = len(x) * blocks * BLOCK_NBYTES[kind]
    storage = np.full(nbytes + 128, 0xFF, np.uint8)
    job = np.zeros(kernel.JOB_FIELDS, np.int64)
    job[kernel.KIND] = kernel.KINDS[kind]
    job[kernel.ELEMENT] = kernel.ELEMENT_NUMBERS[DTYPES[x.dtype]]
    job[kernel.X], job[kernel.X_ROW_BYTES] = x.data_ptr(), x.stride(0) * x.element_size()
    job[kernel.TOKENS], job[kernel.COLUMNS] = x.shape
    job[kernel.BLOCKS], job[kernel.TOKENS_PER_CHUNK] = storage.ctypes.data + 64, 2
    chunks = -(-len(x) // 2)
    shared_pool(2).run(np.array([[kernel.quantise_task(True), job.ctypes.data, chunks]], np.int64))
    assert (storage[:64] == 0xFF).all()
    assert (storage[64 + nbytes :] == 0xFF).all()
    return storage[64 : 64 + nbytes].reshape(len(x), blocks, -1)


def assert_blocks(blocks: np.ndarray, x: torch.Tensor, kind: str) -> None:
    codes, scales, sums = quantise(x)
    element, _, offset = kind.partition("_")
    if element == "bytes":
        found = blocks[..., :64].copy().view(np.int8)
    else:
        found = blocks[..., :128].copy().view(np.int16).reshape(*blocks.shape[:2], 16, 2, 2).swapaxes(-1, -2)
    tail = blocks[..., 64 if element == "bytes" else 128 :]
    np.testing.assert_array_equal(found.reshape(len(x), -1), codes.numpy())
    np.testing.assert_array_equal(tail[..., :4].copy().view(np.float32)[..., 0], scales.numpy())
    halves = -int(offset) * sums.numpy().reshape(*blocks.shape[:2], 2)
    corrections = np.concatenate([halves, halves.sum(-1, keepdims=True)], -1)
    np.testing.assert_array_equal(tail[..., 4:].copy().view(np.int32), corrections)


@pytest.mark.parametrize("kind", ["bytes_8", "bytes_12", "bytes_128", "words_128"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 63, 64, 65, 200])
def test_equals_the_reference(kind: str, dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    x[3] = 0
    assert_blocks(run(x, kind), x, kind)


@pytest.mark.parametrize("kind", ["bytes_8", "words_128"])
def test_ties_limits_and_what_is_not_finite(kind: str) -> None:
    x = torch.zeros(7, 70)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5])
    x[1, 3] = torch.finfo(torch.float32).max
    x[2, 69] = 2.0**-149
    x[3, 69] = 127 * 2.0**-126
    x[4, 2], x[5, 65], x[6, 0] = torch.nan, torch.inf, -torch.inf
    assert_blocks(run(x, kind), x, kind)


def test_rows_far_apart() -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))[:, 100:170]
    assert_blocks(run(x, "bytes_12"), x, "bytes_12")


def test_floats_are_copied() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = run(x, "floats").reshape(3, -1).view(np.float32)
    np.testing.assert_array_equal(found[:, :70], x.float().numpy())
    assert (found[:, 70:] == 0).all()
