from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from benchmarks import checkpoints
from benchmarks.gguf_files import differing_tensors, ensure_gguf, ensure_random_gguf

SHAPE = checkpoints.Shape(
    layers=2, hidden=256, experts=4, expert_intermediate=256, top_k=2, heads=4, kv_heads=2, head_dim=64, vocab=128
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("work")
    checkpoint = checkpoints.ensure_checkpoint(SHAPE, work)
    return checkpoint, ensure_gguf(checkpoint, work)


def test_holds_the_checkpoints_weights(written):
    checkpoint, path = written
    assert differing_tensors(checkpoint, path) == []
    reader = GGUFReader(path)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == (128, 256)
    assert shapes["blk.1.attn_k.weight"] == (128, 256)
    assert shapes["blk.1.ffn_gate_inp.weight"] == (4, 256)
    assert shapes["blk.1.ffn_down_exps.weight"] == (4, 256, 256)
    assert reader.fields["qwen3moe.expert_used_count"].parts[-1][0] == 2


def test_a_wrong_weight_is_found(written, tmp_path):
    checkpoint, path = written
    copy = tmp_path / path.name
    content = np.fromfile(path, dtype=np.uint8)
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up_exps.weight")
    content[tensor.data_offset + 5] ^= 1
    content.tofile(copy)
    assert differing_tensors(checkpoint, copy) == ["blk.0.ffn_up_exps.weight"]


def test_is_written_once(written):
    checkpoint, path = written
    before = path.stat().st_mtime_ns
    assert ensure_gguf(checkpoint, path.parent.parent) == path
    assert path.stat().st_mtime_ns == before


def test_random_weights_have_the_tensors_of_a_checkpoint(written, tmp_path):
    path = ensure_random_gguf(SHAPE.config(), tmp_path, "tiny")
    found, expected = (
        {tensor.name: tuple(map(int, tensor.shape)) for tensor in GGUFReader(file).tensors}
        for file in (path, written[1])
    )
    assert found == expected
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q4_0"
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    weights = dequantize(tensors["blk.1.attn_q.weight"].data, tensors["blk.1.attn_q.weight"].tensor_type)
    assert weights.shape == (256, 256) and 0.018 < weights.std() < 0.022
