import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload.checkpoint import files
from offload.checkpoint.checkpoint import Checkpoint
from offload.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    InvalidArgumentError,
    StorageError,
)
from placement.tensors import TensorSpan
from tests.checkpoint.crafted import entry, two_shards, write_raw


def hub_layout(cache, content, blob="0f" * 32, commit="c" * 40, repository="someone/tiny"):
    """A Hub cache with one repository of one file."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    save_file(content, root / "blobs" / blob)
    (snapshot / "model.safetensors").symlink_to(os.path.join("..", "..", "blobs", blob))
    return snapshot


@pytest.fixture
def directory(tmp_path):
    two_shards(tmp_path)
    return tmp_path


@pytest.mark.parametrize("once", [False, True])
def test_reads_what_was_written(directory, once):
    with Checkpoint.open(directory) as checkpoint:
        expected = {}
        for shard in sorted(directory.glob("*.safetensors")):
            expected |= load_file(shard)
        assert set(checkpoint.tensors) == set(expected)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in expected.items():
            read = checkpoint.read(checkpoint.tensors[name], once=once)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.zeros(0, 3), torch.zeros(3, 0, dtype=torch.int8)])
def test_reads_scalars_and_empty_tensors(tmp_path, tensor):
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        read = checkpoint.read(checkpoint.tensors["t"])
    assert read.shape == tensor.shape and read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_reads_part_of_a_tensor_at_an_odd_offset(tmp_path):
    # Three bytes in front leave the floats unaligned in the file.
    save_file({"x": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "x")
    floats = torch.arange(8.0)
    header = {"x": entry(0, 3), "f": entry(3, 35, "F32", [8])}
    write_raw(tmp_path / "model.safetensors", header, bytes(3) + floats.numpy().tobytes())
    with Checkpoint.open(tmp_path) as checkpoint:
        span = checkpoint.tensors["f"]
        part = TensorSpan(span.file, span.offset + 8, 12, span.dtype, (3, 1))
        assert torch.equal(checkpoint.read(part), floats[2:5].reshape(3, 1))


def test_dtype_that_torch_lacks(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": entry(0, 2, "F4", [4])}, b"ab")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="F4"):
        checkpoint.read(checkpoint.tensors["a"])


def test_buffer_of_another_size_is_refused(directory):
    with Checkpoint.open(directory) as checkpoint, pytest.raises(InvalidArgumentError):
        checkpoint.read_into(checkpoint.tensors["a"], memoryview(bytearray(3)))


def test_file_of_another_checkpoint_is_refused(directory):
    with Checkpoint.open(directory) as checkpoint, pytest.raises(InvalidArgumentError, match="passwd"):
        checkpoint.read(TensorSpan("/etc/passwd", 0, 4, "U8", (4,)))


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nothing"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match="a file"):
        Checkpoint.open(tmp_path / "file")


def test_relative_directory_survives_a_change_of_directory(directory, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(directory.parent)
    checkpoint = Checkpoint.open(directory.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with checkpoint:
        assert checkpoint.read(checkpoint.tensors["a"]).shape == (2, 3)


def test_identity_is_that_of_the_files(directory):
    first = Checkpoint.open(directory).identity
    assert Checkpoint.open(directory).identity == first
    shard = directory / "model-00002-of-00002.safetensors"
    save_file({"c": torch.zeros(3, dtype=torch.bfloat16)}, shard)
    assert Checkpoint.open(directory).identity != first


def test_identity_of_hub_snapshots_follows_the_blob(tmp_path):
    content = {"a": torch.ones(4)}
    one = Checkpoint.open(hub_layout(tmp_path / "one", content)).identity
    copy = Checkpoint.open(hub_layout(tmp_path / "two", content, commit="d" * 40)).identity
    other = Checkpoint.open(hub_layout(tmp_path / "three", content, blob="1e" * 32)).identity
    assert one == copy != other


def test_reads_through_the_links_of_a_hub_snapshot(tmp_path):
    with Checkpoint.open(hub_layout(tmp_path, {"a": torch.arange(4)})) as checkpoint:
        assert torch.equal(checkpoint.read(checkpoint.tensors["a"]), torch.arange(4))
        checkpoint.check_unchanged()


def replace(path):
    save_file({"c": torch.zeros(3, dtype=torch.bfloat16)}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def rewrite(path):
    # The content is the same and the time is not.
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [replace, rewrite, os.unlink])
def test_change_is_noticed(directory, change):
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.check_unchanged()
        shard = directory / "model-00002-of-00002.safetensors"
        change(shard)
        with pytest.raises(CheckpointChangedError, match="00002-of-00002"):
            checkpoint.check_unchanged()


def test_replaced_before_the_first_read(directory):
    with Checkpoint.open(directory) as checkpoint:
        replace(directory / "model-00002-of-00002.safetensors")
        with pytest.raises(CheckpointChangedError):
            checkpoint.read(checkpoint.tensors["c"])


def test_replaced_after_the_first_read_still_reads_the_old_file(directory):
    with Checkpoint.open(directory) as checkpoint:
        before = checkpoint.read(checkpoint.tensors["c"])
        replace(directory / "model-00002-of-00002.safetensors")
        assert torch.equal(checkpoint.read(checkpoint.tensors["c"]), before)


def test_truncated_while_open(directory):
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.read(checkpoint.tensors["a"])
        os.truncate(checkpoint.tensors["a"].file, 40)
        with pytest.raises(CheckpointChangedError, match="shorter"):
            checkpoint.read(checkpoint.tensors["a"])


def test_lasting_device_error(directory, monkeypatch):
    monkeypatch.setattr(files, "FIRST_RETRY_SECONDS", 0.0)
    with Checkpoint.open(directory) as checkpoint:

        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StorageError, match="00001-of-00002"):
            checkpoint.read(checkpoint.tensors["a"])


def test_closed_checkpoint_reads_no_more(directory):
    checkpoint = Checkpoint.open(directory)
    checkpoint.read(checkpoint.tensors["a"])
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.read(checkpoint.tensors["a"])


def test_no_descriptor_is_left(directory):
    before = set(os.listdir("/proc/self/fd"))
    with Checkpoint.open(directory) as checkpoint:
        for span in checkpoint.tensors.values():
            checkpoint.read(span)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    assert set(os.listdir("/proc/self/fd")) == before


def test_many_threads_read_the_same_and_close_waits_for_them(directory, monkeypatch):
    checkpoint = Checkpoint.open(directory)
    expected = {name: checkpoint.read(span) for name, span in checkpoint.tensors.items()}
    entered, release = threading.Event(), threading.Event()
    real = os.preadv

    def slow(*arguments):
        entered.set()
        assert release.wait(10)
        return real(*arguments)

    wrong: list[str] = []

    def work():
        wrong.extend(name for name, span in checkpoint.tensors.items() if not equal(checkpoint, span, expected[name]))

    def equal(opened, span, tensor):
        try:
            return torch.equal(opened.read(span), tensor)
        except ClosedError:
            return True

    monkeypatch.setattr(os, "preadv", slow)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    closing = threading.Thread(target=checkpoint.close)
    closing.start()
    release.set()
    for thread in [*threads, closing]:
        thread.join(10)
        assert not thread.is_alive()
    assert wrong == []
