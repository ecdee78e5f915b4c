"""A chunk that the planner chose: its plan says it, the runtime executes it, and outputs are transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offload
from offload import preparation
from offload.errors import InvalidArgumentError
from placement.datasheets import datasheet
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt, reference_model

TOKENS, CONTEXT = 150, 160


def test_left_padded_batches_in_chunks_give_the_tokens_of_transformers(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = datasheet(cpu="ddr5-desktop", drive="gen4")
    monkeypatch.setattr(preparation, "cached_profile", lambda root: profile)
    directory = tiny_checkpoint("qwen3_moe")
    ram = offload.plan(directory, ram="1GiB", context=CONTEXT, batch=2, prefill_chunk=128).minimum_ram_nbytes
    with pytest.raises(offload.errors.DoesNotFitError):
        offload.plan(directory, ram=ram, context=CONTEXT, batch=2, prefill_chunk=CONTEXT)
    model = offload.load(directory, ram=ram, nvme=store_root, context=CONTEXT, batch=2, prefill_chunk="auto")
    assert model.offload.plan.workload.prefill_chunk_tokens == 128, "the only one that fits"
    ids = prompt(tokens=TOKENS, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    options = {"attention_mask": mask, "new_tokens": 6}
    expected = greedy(reference_model(directory, torch.float32), ids, prefill_chunk_size=128, **options)
    assert torch.equal(greedy(model, ids, **options), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=128, **options), expected)
    model.offload.check()
    model.offload.close()


def test_without_a_profile_there_is_nothing_to_choose_by(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "cached_profile", lambda root: None)
    with pytest.raises(InvalidArgumentError, match="run `offload profile`, or give a number"):
        offload.plan(tiny_checkpoint("qwen3_moe"), ram="1GiB", context=CONTEXT, prefill_chunk="auto")
