import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch

from offload.checkpoint.bundles import CheckpointBundleSource
from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.experts import map_checkpoint
from offload.errors import CheckpointChangedError, InvalidArgumentError
from tests.checkpoint.test_experts import reference_expert

POISON = 0xA5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def source_of(saved, format="bf16", **options):
    checkpoint = Checkpoint.open(saved.directory)
    mapped = map_checkpoint(saved.skeleton(), checkpoint.tensors).experts
    return CheckpointBundleSource(checkpoint, mapped, DTYPES[format], format, "tiny", **options), checkpoint


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("original", [True, False], ids=["hub-format", "transformers-format"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe"])
def test_bundle_holds_the_weights_and_zeros(save_tiny, model_type, original, format, once):
    saved = save_tiny(model_type, original=original, sharded=True)
    source, checkpoint = source_of(saved, format, once=once)
    with checkpoint:
        for number, group in enumerate(source.groups):
            module = saved.model.get_submodule(group.module)
            assert group.count == len(module.down_proj)
            for expert in range(group.count):
                out = np.full(group.layout.nbytes, POISON, np.uint8)
                source.fill_bundle(number, expert, out)
                assert np.array_equal(out, expected_bundle(group.layout, module, expert, DTYPES[format]))


def expected_bundle(layout, module, expert, dtype):
    bundle = np.zeros(layout.nbytes, np.uint8)
    parts = reference_expert(module, expert)
    assert set(parts) == set(layout.components)
    for name, component in layout.components.items():
        content = parts[name].detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
        assert parts[name].shape == component.shape
        bundle[component.offset : component.offset + component.nbytes] = content
    return bundle


@pytest.mark.parametrize(("model_type", "reads"), [("mixtral", 3), ("granitemoe", 3), ("gpt_oss", 4)])
def test_no_byte_is_read_twice(save_tiny, monkeypatch, model_type, reads):
    source, checkpoint = source_of(save_tiny(model_type))
    real, seen = os.preadv, []

    def preadv(descriptor, buffers, offset):
        seen.append((offset, sum(len(buffer) for buffer in buffers)))
        return real(descriptor, buffers, offset)

    with checkpoint:
        monkeypatch.setattr(os, "preadv", preadv)
        layout = source.groups[0].layout
        source.fill_bundle(0, 1, np.empty(layout.nbytes, np.uint8))
    assert len(seen) == reads
    assert sum(nbytes for _, nbytes in seen) == layout.payload_nbytes


def test_bundle_may_lie_at_any_address(save_tiny):
    source, checkpoint = source_of(save_tiny("gpt_oss"))
    nbytes = source.groups[0].layout.nbytes
    slab = np.full(2 * nbytes + 64, POISON, np.uint8)
    with checkpoint:
        source.fill_bundle(0, 0, slab[64 : 64 + nbytes])
    assert (slab[:64] == POISON).all() and (slab[64 + nbytes :] == POISON).all()
    assert slab[64 : 64 + nbytes].any()


@pytest.mark.parametrize(
    "out", [np.empty(100, np.uint8), np.empty(1 << 20, np.float32), np.empty(1 << 20, np.uint8)[::2]]
)
def test_buffer_that_is_no_bundle_is_refused(save_tiny, out):
    source, checkpoint = source_of(save_tiny("mixtral"))
    with checkpoint, pytest.raises(InvalidArgumentError):
        source.fill_bundle(0, 0, out)


@pytest.mark.parametrize(("dtype", "format"), [(torch.float16, "bf16"), (torch.float32, "fp16"), (torch.int8, "int8")])
def test_format_that_does_not_hold_the_dtype_is_refused(save_tiny, dtype, format):
    saved = save_tiny("mixtral")
    with Checkpoint.open(saved.directory) as checkpoint:
        mapped = map_checkpoint(saved.skeleton(), checkpoint.tensors).experts
        with pytest.raises(InvalidArgumentError, match=format):
            CheckpointBundleSource(checkpoint, mapped, dtype, format, "tiny")


def test_identity_follows_checkpoint_format_and_layers(save_tiny):
    saved = save_tiny("mixtral")
    source, checkpoint = source_of(saved)
    with checkpoint:
        mapped = map_checkpoint(saved.skeleton(), checkpoint.tensors).experts
        same = CheckpointBundleSource(checkpoint, mapped, torch.bfloat16, "bf16", "another name")
        fewer = CheckpointBundleSource(checkpoint, mapped[1:], torch.bfloat16, "bf16", "tiny")
        wider = CheckpointBundleSource(checkpoint, mapped, torch.float32, "fp32", "tiny")
    other, opened = source_of(save_tiny("mixtral", sharded=True))
    opened.close()
    assert source.identity == same.identity
    assert len({source.identity, fewer.identity, wider.identity, other.identity}) == 4
    assert (source.name, same.name) == ("tiny", "another name")


def test_change_of_the_checkpoint_is_noticed(save_tiny, tmp_path):
    saved = save_tiny("mixtral")
    shutil.copy(saved.directory / "model.safetensors", tmp_path)
    source, checkpoint = source_of(dataclasses.replace(saved, directory=tmp_path))
    with checkpoint:
        source.check_unchanged()
        file = tmp_path / "model.safetensors"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(CheckpointChangedError):
            source.check_unchanged()
