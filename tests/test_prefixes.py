"""Saved prefixes: prompts that begin with one give what they give without, in this process and in later ones."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.errors import DoesNotFitError, InvalidArgumentError, PrefixRejectedWarning, UnsupportedOperationError
from placement import kv
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt, reference_model
from tests.kv.tables import SETTINGS

CONTEXT, PREFIX = 250, 150
Load = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "SETTINGS", SETTINGS)


def _load(directory: Path, store_root: Path, **options: Any) -> PreTrainedModel:
    settings = {"ram": "1GiB", "context": CONTEXT, "batch": 2, "kv_ram": "16MiB", "prefix_cache": "8MiB", **options}
    return offload.load(directory, nvme=store_root, **settings)


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Iterator[Load]:
    loaded: list[PreTrainedModel] = []

    def make(model_type: str, **options: Any) -> PreTrainedModel:
        loaded.append(_load(tiny_checkpoint(model_type, torch.float32), tmp_path, **options))
        return loaded[-1]

    yield make
    for model in loaded:
        model.offload.check()
        model.offload.close()


@pytest.mark.parametrize(("model_type", "batch"), [("qwen3_moe", 1), ("deepseek_v3", 2)])
def test_a_prompt_begins_with_what_was_saved(
    model_type: str, batch: int, tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    reference = reference_model(tiny_checkpoint(model_type), torch.float32)
    ids = prompt(batch=batch, tokens=200)
    ids[:, :PREFIX] = ids[:1, :PREFIX]
    expected = greedy(reference, ids)
    model = load(model_type)
    path = model.offload.save_prefix(ids[:1, :PREFIX])
    assert path.exists()
    before = model.offload.stats()
    assert torch.equal(greedy(model, ids), expected)
    found = model.offload.stats()
    assert found.prefix.reused == 1 and found.prefix.reused_tokens == PREFIX
    assert found.prefill_tokens - before.prefill_tokens == batch * (200 - PREFIX)
    other = ids.clone()
    other[:, 0] += 1
    assert torch.equal(greedy(model, other), greedy(reference, other))
    assert model.offload.stats().prefix.reused == 1

    later = load(model_type)
    assert torch.equal(greedy(later, ids), expected)
    assert later.offload.stats().prefix.reused_tokens == PREFIX


def test_packed_blocks_are_saved_as_they_are(load: Load) -> None:
    ids = prompt(batch=1, tokens=200)
    model = load("qwen3_moe", kv="int8")
    expected = greedy(model, ids, prefill_chunk_size=PREFIX)
    model.offload.save_prefix(ids[:, :PREFIX])
    assert torch.equal(greedy(model, ids), expected)
    assert model.offload.stats().prefix.reused == 1
    plain = load("qwen3_moe")
    greedy(plain, ids)
    assert plain.offload.stats().prefix.reused == 0, "a prefix of another format"


def test_a_damaged_file_is_refused_and_computed_again(load: Load) -> None:
    ids = prompt(batch=1, tokens=200)
    model = load("qwen3_moe")
    expected = greedy(model, ids)
    path = model.offload.save_prefix(ids[:, :PREFIX])
    damaged = bytearray(path.read_bytes())
    damaged[-5000] ^= 1
    path.write_bytes(damaged)
    with pytest.warns(PrefixRejectedWarning, match="computed again: .*checksum"):
        assert torch.equal(greedy(model, ids), expected)
    assert not path.exists()
    found = model.offload.stats().prefix
    assert (found.rejected, found.reused) == (1, 0)


def test_padded_prompts_and_short_ones_are_computed(load: Load) -> None:
    ids = prompt(batch=1, tokens=PREFIX)
    model = load("qwen3_moe")
    model.offload.save_prefix(ids)
    greedy(model, ids)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    greedy(model, torch.cat([ids, ids[:, :20]], 1), attention_mask=torch.cat([mask, mask[:, 10:30]], 1))
    assert model.offload.stats().prefix.reused == 0


def _reuse(directory: Path, store_root: Path, ids: list[list[int]], results: Any) -> None:
    torch.set_num_threads(1)
    kv.SETTINGS = SETTINGS
    model = _load(directory, store_root)
    tokens = greedy(model, torch.tensor(ids)).tolist()
    results.put((tokens, model.offload.stats().prefix.reused_tokens))


def test_another_process_begins_with_it(load: Load, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    ids = prompt(batch=1, tokens=200)
    model = load("qwen3_moe")
    expected = greedy(model, ids)
    model.offload.save_prefix(ids[:, :PREFIX])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    directory = tiny_checkpoint("qwen3_moe", torch.float32)
    worker = context.Process(target=_reuse, args=(directory, tmp_path, ids.tolist(), results))
    worker.start()
    tokens, reused = results.get(timeout=120)
    worker.join()
    assert tokens == expected.tolist() and reused == PREFIX


def test_what_cannot_be_is_refused(load: Load) -> None:
    model = load("qwen3_moe", prefix_cache=None)
    with pytest.raises(UnsupportedOperationError, match="prefix_cache="):
        model.offload.save_prefix(prompt(batch=1, tokens=20))
    assert model.offload.stats().prefix is None
    model = load("qwen3_moe")
    with pytest.raises(InvalidArgumentError, match="input_ids: expected"):
        model.offload.save_prefix(prompt(batch=2, tokens=20))
    with pytest.raises(DoesNotFitError, match="prefix_cache allows"):
        load("qwen3_moe", prefix_cache=1).offload.save_prefix(prompt(batch=1, tokens=20))
