"""What was learnt is kept with the store, and nothing that is wrong with the file does harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import offload
from offload import learnt
from offload.errors import LearntFileWarning
from offload.store import files
from offload.store.catalog import list_stores, remove_store
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt
from tests.test_prefetching import small_budget


def load(directory: Path, root: Path) -> Any:
    return offload.load(
        directory, ram=small_budget(directory, 7), nvme=root, context=80, policy="forecast", prefetch=True
    )


def tables(model: Any) -> dict[str, Any]:
    learners = model.offload.learners
    return {f"{name}/{key}": table for name, one in learners.items() for key, table in one.state().items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(table.astype(np.float32), expected[name].astype(np.float32)) for name, table in found.items()
    )


def test_what_was_learnt_is_kept_with_the_store(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    model = load(directory, tmp_path)
    path = learnt.learnt_path(model.offload.store)
    fresh = tables(model)
    model.offload.close()
    assert not path.exists(), "nothing was learnt"

    model = load(directory, tmp_path)
    greedy(model, prompt())
    assert model.offload.stats().skills
    taught = tables(model)
    model.offload.close()
    assert not same(taught, fresh)
    whole = path.read_bytes()

    model = load(directory, tmp_path)
    assert same(tables(model), taught)
    model.offload.close()
    assert path.read_bytes() == whole, "nothing was decoded, so nothing is written"

    def starts_anew() -> None:
        with pytest.warns(LearntFileWarning, match="is ignored"):
            model = load(directory, tmp_path)
        assert same(tables(model), fresh)
        model.offload.close()

    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(damaged)
        starts_anew()
    flipped = bytearray(whole)
    flipped[len(flipped) // 3] ^= 8
    path.write_bytes(bytes(flipped))
    starts_anew()
    monkeypatch.setattr(learnt, "VERSION", 99)
    path.write_bytes(whole)
    starts_anew()
    monkeypatch.undo()

    # A disk that is full costs what was learnt, and nothing else.
    path.write_bytes(whole)
    model = load(directory, tmp_path)
    greedy(model, prompt())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    with pytest.warns(LearntFileWarning, match="not kept.*No space left"):
        model.offload.close()
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".*.tmp"))

    (store,) = list_stores(tmp_path)
    remove_store(tmp_path, store.key)
    assert not list(tmp_path.iterdir())
