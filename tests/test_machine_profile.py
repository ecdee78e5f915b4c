"""Which files the disk is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from offload import machine_profile
from offload.machine_profile import _files_to_read, store_files


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_stores_that_are_there_are_read(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(b"\0" * (1 << 20))
    monkeypatch.setattr(machine_profile, "store_files", lambda _root: [shard])
    said: list[str] = []
    found, note = _files_to_read(tmp_path, 1 << 20, stack, said.append)
    assert (found.result().paths, said) == ((shard,), [])
    assert "stores that were there" in note
    found, note = _files_to_read(tmp_path, 8 << 20, stack, said.append)
    assert shard not in found.result().paths, "too little of them"
    assert "just written" in note
    stack.close()
    assert list(tmp_path.iterdir()) == [shard]


def test_a_directory_without_stores_has_none(tmp_path: Path) -> None:
    assert store_files(tmp_path) == []
    assert store_files(tmp_path / "not" / "there") == []
