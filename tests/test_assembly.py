"""Dense weights load beside the conversion where the plan has the memory, and after it where not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import offload
from offload import assembly
from offload.checkpoint.checkpoint import Checkpoint
from offload.errors import CheckpointError, StorageError
from offload.preparation import PreparedCheckpoint
from offload.store.catalog import list_stores
from offload.store.progress import Progress
from tests.conftest import TinyCheckpoint


@pytest.fixture
def directory(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that load dense weights."""
    names: list[str] = []
    original = PreparedCheckpoint.finish

    def finish(self: PreparedCheckpoint, progress: Progress) -> PreTrainedModel:
        names.append(threading.current_thread().name)
        return original(self, progress)

    monkeypatch.setattr(PreparedCheckpoint, "finish", finish)
    return names


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []
    original = Checkpoint.close

    def close(self: Checkpoint) -> None:
        events.append("closed")
        original(self)

    monkeypatch.setattr(Checkpoint, "close", close)
    return events


@pytest.mark.parametrize("beside", [True, False])
def test_where_dense_weights_load(
    directory: Path, tmp_path: Path, loaders: list[str], monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    monkeypatch.setattr(assembly, "conversion_nbytes", lambda groups: 0 if beside else 1 << 40)
    for converts in (True, False):
        with offload.load(directory, ram="1GiB", nvme=tmp_path, context=64).offload:
            pass
        assert loaders.pop().startswith("dense-loader") == (beside and converts)


@pytest.mark.parametrize("beside", [True, False])
def test_a_failed_conversion_ends_the_load(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str], beside: bool
) -> None:
    monkeypatch.setattr(assembly, "conversion_nbytes", lambda groups: 0 if beside else 1 << 40)

    def convert(*args: object, **options: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(assembly, "convert", convert)
    with pytest.raises(StorageError, match="disk is full"):
        offload.load(directory, ram="1GiB", nvme=tmp_path, context=64)
    assert closed == ["closed"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dense-loader")]


@pytest.mark.parametrize("beside", [True, False])
def test_dense_weights_that_fail_leave_a_whole_store(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str], beside: bool
) -> None:
    monkeypatch.setattr(assembly, "conversion_nbytes", lambda groups: 0 if beside else 1 << 40)

    def finish(self: PreparedCheckpoint, progress: Progress) -> PreTrainedModel:
        raise CheckpointError("lacks weights")

    monkeypatch.setattr(PreparedCheckpoint, "finish", finish)
    with pytest.raises(CheckpointError, match="lacks weights"):
        offload.load(directory, ram="1GiB", nvme=tmp_path, context=64)
    assert closed == ["closed"]
    assert [info.status for info in list_stores(tmp_path)] == ["complete"]
