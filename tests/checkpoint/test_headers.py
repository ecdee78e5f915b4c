import json
import os
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.headers import read_header
from offload.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.crafted import entry, write_raw


def test_agrees_with_the_library_that_writes_such_files(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 3, 4).bfloat16(),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False]),
        'ümlaut " quote': torch.ones(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header.tensors) == set(tensors)
    content = path.read_bytes()
    assert header.identity.size == len(content)
    for name, tensor in tensors.items():
        span = header.tensors[name]
        assert span.file == str(path)
        assert span.shape == tuple(tensor.shape)
        assert content[span.offset : span.offset + span.nbytes] == tensor.view(-1).view(torch.uint8).numpy().tobytes()


def test_digest_follows_the_header(tmp_path):
    one = write_raw(tmp_path / "one", {"a": entry(0, 4)}, b"abcd")
    same = write_raw(tmp_path / "same", {"a": entry(0, 4)}, b"efgh")
    other = write_raw(tmp_path / "other", {"b": entry(0, 4)}, b"abcd")
    assert read_header(one).digest == read_header(same).digest != read_header(other).digest


def test_spaces_that_pad_the_header_are_allowed(tmp_path):
    path = write_raw(tmp_path / "f", json.dumps({"a": entry(0, 4)}).encode() + b" " * 100, b"abcd")
    assert read_header(path).tensors["a"].nbytes == 4


def test_order_in_the_header_is_free(tmp_path):
    path = write_raw(tmp_path / "f", {"late": entry(3, 8), "early": entry(0, 3)}, b"abcdefgh")
    assert read_header(path).tensors["early"].offset + 3 == read_header(path).tensors["late"].offset


BAD_HEADERS = {
    "no JSON": (b"{nonsense", b"", "JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "no object": (b"[1, 2]", b"", "object"),
    "deeply nested": (b'{"a":' + b"[" * 200_000, b"", "JSON"),
    "duplicate tensor": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"abcd", "twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', b"abcd", "dtype"),
    "unknown dtype": ({"a": entry(0, 4, "F31")}, b"abcd", "F31"),
    "dtype no string": ({"a": entry(0, 4) | {"dtype": ["U8"]}}, b"abcd", "dtype"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, b"abcd", "data_offsets"),
    "extra field": ({"a": entry(0, 4) | {"strides": [1]}}, b"abcd", "strides"),
    "entry no object": ({"a": 3}, b"", "object"),
    "negative shape": ({"a": entry(0, 4, shape=[-4])}, b"abcd", "non-negative"),
    "boolean shape": ({"a": entry(0, 1, shape=[True])}, b"a", "integers"),
    "fractional shape": ({"a": entry(0, 4, shape=[4.0])}, b"abcd", "integers"),
    "shape overflow": ({"a": entry(0, 4, shape=[2**40, 2**40])}, b"abcd", "2^63"),
    "shape overflow to zero": ({"a": entry(0, 0, shape=[2**32, 2**32])}, b"", "2^63"),
    "endless shape": ({"a": entry(0, 0, shape=[3] * 100_000)}, b"", "2^63"),
    "huge integer": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"abcd", "JSON"),
    "backward range": ({"a": entry(4, 0, shape=[4])}, b"abcd", "begin <= end"),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, b"abcd", "begin"),
    "size unlike shape": ({"a": entry(0, 4, "F32", [2])}, b"abcd", "8 bytes"),
    "half a byte": ({"a": entry(0, 1, "F4", [3])}, b"a", "1.5 bytes"),
    "beyond the end": ({"a": entry(0, 8)}, b"abcd", "truncated"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"abcdef", "overlap"),
    "hole": ({"a": entry(0, 2), "b": entry(3, 5)}, b"abcde", "hole"),
    "hole at the start": ({"a": entry(1, 5)}, b"abcde", "hole"),
    "bytes behind": ({"a": entry(0, 4)}, b"abcdef", "no tensor"),
    "metadata no strings": ({"__metadata__": {"x": 1}, "a": entry(0, 4)}, b"abcd", "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused_by_name(tmp_path, case):
    header, data, words = BAD_HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert "Fix:" in message


@pytest.mark.parametrize("length", [0, 1, 30, 2**31, 2**63, 2**64 - 1])
def test_length_field_that_lies(tmp_path, length):
    path = write_raw(tmp_path / "model.safetensors", {"a": entry(0, 4)}, b"", length)
    with pytest.raises(CheckpointError, match=r"header length|JSON"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7, 8])
def test_file_too_short_for_a_header(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02" + b"\0" * (size - 1) if size else b"")
    with pytest.raises(CheckpointError, match="expected"):
        read_header(path)


def test_truncated_at_any_length(tmp_path):
    whole = write_raw(tmp_path / "whole", {"a": entry(0, 3), "b": entry(3, 5)}, b"abcde").read_bytes()
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_flipped_bits_are_refused_or_leave_a_sound_header(tmp_path):
    header = {"first": entry(0, 24, "F32", [2, 3]), "second": entry(24, 32, "BF16", [4])}
    whole = write_raw(tmp_path / "whole", header, bytes(32)).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    refused = 0
    for _ in range(400):
        broken = bytearray(whole)
        position = int(random.integers(0, len(whole) - 32))
        broken[position] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(broken)
        try:
            tensors = read_header(path).tensors
        except CheckpointError:
            refused += 1
        else:
            # A flip in a name or to a dtype of the same size cannot be seen; the ranges must still be true.
            assert sum(span.nbytes for span in tensors.values()) == 32
    assert refused > 200


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        read_header(tmp_path / "nowhere")


def _fifo(path):
    os.mkfifo(path)


def _loop(path):
    path.symlink_to(path)


def _directory(path):
    path.mkdir()


def _device(path):
    path.symlink_to("/dev/zero")


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [_fifo, _loop, _directory, _device, _socket])
def test_what_is_no_regular_file_neither_blocks_nor_passes(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match="expected"):
        read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", {"a": entry(0, 4)}, b"abcd")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="readable"):
        read_header(path)
