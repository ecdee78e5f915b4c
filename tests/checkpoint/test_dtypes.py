import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.dtypes import DTYPE_BITS, TORCH_DTYPES, WEIGHT_DTYPES
from offload.checkpoint.headers import read_header


@pytest.mark.parametrize("tag", TORCH_DTYPES)
def test_tags_are_those_that_safetensors_writes(tmp_path, tag):
    dtype = TORCH_DTYPES[tag]
    save_file({"t": torch.zeros(3, dtype=torch.uint8).to(dtype)}, tmp_path / "f")
    span = read_header(tmp_path / "f").tensors["t"]
    assert span.dtype == tag
    assert span.nbytes * 8 == 3 * DTYPE_BITS[tag] == 24 * dtype.itemsize


def test_weight_dtypes_are_floating():
    assert all(TORCH_DTYPES[tag].is_floating_point for tag in WEIGHT_DTYPES)
