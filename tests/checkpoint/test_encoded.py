"""Codes and scales of quantised checkpoints: the weights that they stand for, and taking parts of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from formats.pack import unpack_matrix
from formats.packed import MatrixLayout
from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.decoded import decoded_tensors
from offload.checkpoint.encoded import EncodedMatrix, pick_component, pick_encoded
from offload.checkpoint.quantised import Encoding
from offload.errors import InvalidArgumentError
from offload.packed_copy import can_copy, copy_codes
from offload.packing import pack_tensor
from placement.tensors import ComponentSource, EncodedSpan, TensorSpan
from tests.quantised_checkpoints import fp8_weights, mxfp4_weights, random_fp8

POISON = 0xA5
BLOCKS = [(128, 128), (64, 32), (1, 128), (48, 1000)]


def random_mxfp4(*shape, low=100, high=150):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_mxfp4_code_with_every_scale_is_what_transformers_makes_of_it(dtype):
    """Each of 256 scales meets each of 256 bytes; 255, which is no number in the format, is one to transformers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T
    found = EncodedMatrix("mxfp4", blocks, scales, (1, 32)).decode(dtype)
    assert found.shape == expected.shape == (256, 512)
    assert torch.equal(found.isnan(), expected.isnan())
    normal = ~expected.isnan()
    assert torch.equal(found[normal], expected[normal])
    assert torch.equal(found.signbit()[normal], expected.signbit()[normal])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_blocks_end_where_the_matrix_does(block, dtype):
    codes, scales = random_fp8(200, 333, block, torch.float32, torch.Generator().manual_seed(1))
    found = EncodedMatrix("fp8", codes, scales, block).decode(dtype)
    assert torch.equal(found, fp8_weights(codes, scales, block).to(dtype))


def test_large_matrices_are_decoded_in_parts():
    blocks, scales = random_mxfp4(301, 90)
    found = EncodedMatrix("mxfp4", blocks, scales, (1, 32)).decode(torch.float32)
    assert torch.equal(found.double(), mxfp4_weights(blocks, scales))


@pytest.mark.parametrize("encoding", ["mxfp4", "fp8"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("axis", "first", "step", "count"), [
    (0, 0, 1, 256), (0, 0, 1, 128), (0, 128, 1, 128), (0, 1, 2, 128), (0, 40, 1, 100), (1, 0, 1, 100), (1, 0, 2, 128),
    (1, 1, 2, 128), (1, 128, 1, 128),
])  # fmt: skip
def test_any_cut_is_that_of_the_decoded_matrix(encoding, transposed, axis, first, step, count):
    """Of matrices and of transposed ones, whole blocks or not."""
    if encoding == "mxfp4":
        codes, scales = random_mxfp4(256, 8)
        matrix = EncodedMatrix("mxfp4", codes, scales, (1, 32))
    else:
        codes, scales = random_fp8(256, 256, (128, 128), torch.float32, torch.Generator().manual_seed(2))
        matrix = EncodedMatrix("fp8", codes, scales, (128, 128))
    stands_for = encoding == "mxfp4"
    part = TensorSpan("file", 0, 1, "U8", (1,))
    span = EncodedSpan("file", 0, 131072, "BF16", (256, 256), encoding, part, part, matrix.block, stands_for)
    source = ComponentSource(span, axis, first, step, count, transposed)
    weights = matrix.decode(torch.float32)
    expected = pick_component(weights.T if stands_for else weights, source)
    found = pick_encoded(matrix, source)
    decoded = found.decode(torch.float32) if isinstance(found, EncodedMatrix) else found
    assert torch.equal(decoded, expected)


def test_stacked_codes_are_read_and_cut_by_expert(tmp_path):
    """As transformers would save experts of fp8: one tensor for all of them."""
    generator = torch.Generator().manual_seed(3)
    pairs = [random_fp8(150, 200, (128, 128), torch.bfloat16, generator) for _ in range(3)]
    codes, scales = (torch.stack([pair[part] for pair in pairs]) for part in range(2))
    save_file({"experts.down": codes, "experts.down_scale_inv": scales}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        tensors = decoded_tensors(checkpoint.tensors, Encoding("fp8", (128, 128)), "F32")
        span = tensors["experts.down"]
        assert list(tensors) == ["experts.down"]
        assert (span.shape, span.dtype, span.nbytes) == ((3, 150, 200), "F32", 3 * 150 * 200 * 4)
        expected = torch.stack([fp8_weights(*pair, (128, 128)) for pair in pairs])
        assert torch.equal(checkpoint.read(span), expected)
        assert torch.equal(checkpoint.read(span.entry(2)), expected[2])
        with pytest.raises(InvalidArgumentError):
            checkpoint.read_into(span, memoryview(bytearray(span.nbytes)))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 200), (300, 63), (20, 384)])
def test_copied_codes_have_the_values_of_the_checkpoint(shape):
    codes, scales = random_fp8(*shape, (128, 128), torch.float32, torch.Generator().manual_seed(4))
    layout, stored, factors = poisoned(*shape)
    matrix = EncodedMatrix("fp8", codes, scales, (128, 128))
    assert can_copy(matrix, layout)
    copy_codes(matrix, layout, stored, factors)
    assert np.array_equal(unpack_matrix(stored, factors, layout), fp8_weights(codes, scales, (128, 128)).numpy())
    again, same = poisoned(*shape)[1:]
    pack_tensor(matrix, layout, again, same, "weights")
    assert np.array_equal(stored, again) and np.array_equal(factors, same)
    assert not padding(stored, layout).any()


def test_every_code_is_copied_and_zero_has_no_sign():
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    codes[:, 127] = codes[:, 255] = 0
    matrix = EncodedMatrix("fp8", codes.view(torch.float8_e4m3fn), torch.tensor([[0.3, -2.5]]), (128, 128))
    layout, stored, factors = poisoned(16, 256)
    copy_codes(matrix, layout, stored, factors)
    assert np.array_equal(unpack_matrix(stored, factors, layout), matrix.decode(torch.float32).numpy())
    assert not (stored == 0x80).any()


def test_blocks_too_small_for_a_scale_become_zero():
    codes, _ = random_fp8(20, 256, (128, 128), torch.float32, torch.Generator().manual_seed(5))
    matrix = EncodedMatrix("fp8", codes, torch.tensor([[2.0**-126, 1.5]]), (128, 128))
    layout, stored, factors = poisoned(20, 256)
    copy_codes(matrix, layout, stored, factors)
    found = unpack_matrix(stored, factors, layout)
    assert not found[:, :128].any()
    assert np.array_equal(found[:, 128:], matrix.decode(torch.float32).numpy()[:, 128:])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 2.0**120])
def test_scales_that_leave_no_finite_weights_are_refused(scale):
    codes = torch.full((20, 256), 448.0).to(torch.float8_e4m3fn)
    matrix = EncodedMatrix("fp8", codes, torch.tensor([[1.0, scale]]), (128, 128))
    with pytest.raises(ValueError, match="infinity"):
        copy_codes(matrix, *poisoned(20, 256))


@pytest.mark.parametrize("block", [(64, 128), (128, 64), (1, 128)])
def test_other_blocks_and_formats_are_not_copied(block):
    codes, scales = random_fp8(256, 256, block, torch.float32, torch.Generator().manual_seed(6))
    assert not can_copy(EncodedMatrix("fp8", codes, scales, block), MatrixLayout(256, 256, "fp8_e4m3"))
    assert not can_copy(EncodedMatrix("fp8", codes, scales, (128, 128)), MatrixLayout(256, 256, "int8"))


@pytest.mark.parametrize("low", [127 - 110, 118])
def test_mxfp4_packed_again_has_the_same_values(low):
    """Whatever codes a group has: 6 in none, only 0.5 in some, zeros of both signs in others."""
    blocks, scales = random_mxfp4(64, 4, low=low, high=low + 12)
    for group, largest in enumerate([0, 1, 2, 3, 4, 5, 6, 7]):
        nibbles = torch.arange(32) % (largest + 1) + 8 * (torch.arange(32) // 3 % 2)
        blocks[group] = (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8)
    layout = MatrixLayout(64, 128, "mxfp4")
    stored, factors = (np.full(n, POISON, np.uint8) for n in (layout.codes_nbytes, layout.scales_nbytes))
    pack_tensor(EncodedMatrix("mxfp4", blocks, scales, (1, 32)), layout, stored, factors, "weights")
    expected = mxfp4_weights(blocks, scales).float().numpy()
    assert np.array_equal(unpack_matrix(stored, factors, layout), expected)


def poisoned(rows, columns):
    layout = MatrixLayout(rows, columns, "fp8_e4m3")
    return layout, np.full(layout.codes_nbytes, POISON, np.uint8), np.full(layout.scales_nbytes, POISON, np.uint8)


def padding(stored, layout):
    """Codes of padding, which stand for zero."""
    wide = MatrixLayout(layout.padded_rows, layout.padded_columns, "fp8_e4m3")
    grid = np.ones(wide.scales_shape, np.float32).reshape(-1).view(np.uint8)
    values = unpack_matrix(stored, grid, wide)
    values[: layout.rows, : layout.columns] = 0
    return values
