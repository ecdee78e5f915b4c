import json
import os

import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.index import INDEX_FILE, read_files
from offload.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.crafted import two_shards, write_index, write_shards


def test_shards_that_the_index_lists(tmp_path):
    weight_map = two_shards(tmp_path)
    headers = read_files(tmp_path)
    assert {tensor: name for name, header in headers.items() for tensor in header.tensors} == weight_map


def test_shard_in_a_directory_below(tmp_path):
    write_shards(tmp_path, {"part/one.safetensors": {"a": torch.ones(2)}})
    assert list(read_files(tmp_path)) == ["part/one.safetensors"]


def test_single_file_comes_before_an_index(tmp_path):
    two_shards(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(read_files(tmp_path)) == ["model.safetensors"]


def test_file_that_no_index_lists_is_ignored(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"anything")
    assert len(read_files(tmp_path)) == 2


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="neither"):
        read_files(tmp_path)


def test_missing_shard(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="00002-of-00002"):
        read_files(tmp_path)


def test_tensor_that_its_shard_lacks(tmp_path):
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, weight_map | {"d": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'd'"):
        read_files(tmp_path)


def test_tensor_that_the_index_lacks(tmp_path):
    weight_map = two_shards(tmp_path)
    del weight_map["b"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"tensor 'b'.*does not list"):
        read_files(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    weight_map = two_shards(tmp_path)
    both = {"c": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(5)}
    save_file(both, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"tensor 'b'.*lists for"):
        read_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "part/../../outside.safetensors",
        "/etc/passwd",
        "",
        ".",
        "a//b",
        "./model.safetensors",
        "nul\0byte",
        "lone \ud800 surrogate",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_name_that_leaves_the_directory_is_refused(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    write_index(inner, {"a": name})
    with pytest.raises(CheckpointError, match="relative name") as caught:
        read_files(inner)
    assert INDEX_FILE in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b"\xff\xfe",
    ],
)
def test_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        read_files(tmp_path)


def test_index_that_is_a_fifo(tmp_path):
    os.mkfifo(tmp_path / INDEX_FILE)
    with pytest.raises(CheckpointError, match="FIFO"):
        read_files(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "loop"])
def test_shard_that_is_no_file(tmp_path, kind):
    two_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    if kind == "fifo":
        os.mkfifo(shard)
    else:
        shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match="regular file"):
        read_files(tmp_path)


def test_index_may_carry_more_than_the_map(tmp_path):
    weight_map = two_shards(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map, "metadata": {"total_size": -1}, "x": []}))
    assert len(read_files(tmp_path)) == 2
