"""Disks that fail while a model runs: a retry or a typed error, and the next request works."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.errors import StorageError, StoreCorruptError
from offload.store.catalog import list_stores
from offload.tiers.disk import ShardReader
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt


class FaultyDisk:
    """A preadv that fails as told; everything else goes to the real one.

    Compiled readers have a descriptor that cannot be read meanwhile, so that they hand their reads to it.
    """

    def __init__(self) -> None:
        self.fail_next = 0
        self.fail_always = False
        self.short_by: random.Random | None = None

    @property
    def is_faulty(self) -> bool:
        return self.fail_always or self.fail_next > 0 or self.short_by is not None

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.fail_always or self.fail_next > 0:
            self.fail_next -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.short_by is not None and len(buffers[0]) > 4096:
            return os.preadv(fd, [buffers[0][: 4096 * self.short_by.randint(1, len(buffers[0]) // 4096)]], offset)
        return os.preadv(fd, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    faulty = FaultyDisk()
    original, direct_fd = ShardReader.__init__, ShardReader.direct_fd

    def make(self: ShardReader, *args: object, **options: object) -> None:
        original(self, *args, **{**options, "preadv": faulty.preadv})  # type: ignore[arg-type]

    monkeypatch.setattr(ShardReader, "__init__", make)
    monkeypatch.setattr(
        ShardReader, "direct_fd", lambda self, shard: -1 if faulty.is_faulty else direct_fd(self, shard)
    )
    return faulty


def _load(directory: Path, root: Path, extra_slots: int = 2) -> PreTrainedModel:
    plan = offload.plan(directory, ram="1GiB", context=64)
    ram = plan.minimum_ram_nbytes + extra_slots * plan.slot_nbytes
    return offload.load(directory, ram=ram, nvme=root, context=64)


def test_a_passing_fault_is_retried(disk: FaultyDisk, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    model = _load(tiny_checkpoint("qwen3_moe"), store_root)
    ids = prompt()
    expected = greedy(model, ids)
    disk.fail_next = 2
    disk.short_by = random.Random(0)
    assert torch.equal(greedy(model, ids), expected)
    assert model.offload.stats().read_retries > 2
    model.offload.check()
    model.offload.close()


@pytest.mark.parametrize("extra_slots", [0, 2, 9])
def test_a_lasting_fault_ends_the_request_and_not_the_model(
    disk: FaultyDisk, tiny_checkpoint: TinyCheckpoint, store_root: Path, extra_slots: int
) -> None:
    model = _load(tiny_checkpoint("qwen3_moe"), store_root, extra_slots)
    ids = prompt()
    expected = greedy(model, ids)
    for _ in range(3):
        disk.fail_always = True
        with pytest.raises(StorageError, match="offload store verify") as caught:
            greedy(model, prompt(seed=9))
        assert caught.value.errno == errno.EIO
        assert caught.value.filename
        model.offload.check()
        disk.fail_always = False
        assert torch.equal(greedy(model, ids), expected)
        model.offload.check()
    model.offload.close()


def test_a_fault_while_everything_is_loaded(
    disk: FaultyDisk, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    disk.fail_always = True
    with pytest.raises(StorageError):
        offload.load(directory, ram="1GiB", nvme=store_root, context=64)
    disk.fail_always = False
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=64)
    greedy(model, prompt(), 2)
    model.offload.close()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_is_an_error_and_never_wrong_tokens(
    damage: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model = _load(tiny_checkpoint("qwen3_moe"), tmp_path)
    (store,) = list_stores(tmp_path)
    (shard,) = sorted(store.path.glob("*.safetensors"))
    for group in range(len(model.offload.layers)):
        for expert in range(model.offload.layers[group].count):
            offset = model.offload.store.location(group, expert).offset
            with shard.open("r+b") as file:
                if damage == "flip":
                    file.seek(offset + 100)
                    byte = file.read(1)
                    file.seek(offset + 100)
                    file.write(bytes([byte[0] ^ 1]))
                else:
                    file.truncate(offset)
                    break
    with pytest.raises(StoreCorruptError, match="offload store rm"):
        greedy(model, prompt(seed=11))
    model.offload.check()
    model.offload.close()


def test_a_store_removed_while_loaded_still_serves(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    model = _load(tiny_checkpoint("qwen3_moe"), tmp_path)
    ids = prompt()
    expected = greedy(model, ids)
    (store,) = list_stores(tmp_path)
    for file in store.path.iterdir():
        file.unlink()
    assert torch.equal(greedy(model, ids), expected)
    model.offload.close()
