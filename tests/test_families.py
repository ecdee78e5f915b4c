"""Every family gives what transformers gives, under every budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offload
from offload.errors import DoesNotFitError
from tests.conftest import TinyCheckpoint
from tests.hf.reference import (
    PaddedBatch,
    assert_as_near_to_fp32,
    assert_same_up_to_near_ties,
    greedy,
    logits,
    prompt,
    reference_model,
)
from tests.tiny_models import ARCHITECTURES


def _minimum_ram(directory: Path, **options: int) -> int:
    with pytest.raises(DoesNotFitError) as caught:
        offload.plan(directory, ram=1, **options)
    return caught.value.minimum_ram_bytes


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fp32_equals_transformers_under_every_budget(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    expected = PaddedBatch(directory)
    minimum = _minimum_ram(directory, context=40, batch=2)
    slot = offload.plan(directory, ram=minimum, context=40, batch=2).slot_nbytes
    seen = []
    for ram, slots in ((minimum, 2), (minimum + 3 * slot, 5), ("1GiB", None)):
        model = offload.load(directory, ram=ram, nvme=store_root, context=40, batch=2)
        with model.offload as runtime:
            plan = runtime.plan
            assert plan.ram_slots == (slots if slots is not None else plan.expert_count)
            seen.append(expected.checked_logits(model))
            expected.check_tokens(model)
            runtime.check()
    assert all(torch.equal(seen[0], other) for other in seen), "logits depend on the budget"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bf16_equals_transformers_up_to_near_ties(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type, torch.bfloat16)
    reference = reference_model(directory, torch.bfloat16, "grouped_mm")
    exact = reference_model(directory, torch.float32)
    ids = prompt(seed=3)
    # Many tokens, because each that nearly ties in a router is a matter of luck.
    probe = prompt(batch=16, tokens=40, seed=7)
    outputs = []
    for ram in (_minimum_ram(directory, context=64, batch=16), "1GiB"):
        model = offload.load(directory, ram=ram, nvme=store_root, context=40, batch=16)
        assert model.dtype is torch.bfloat16
        outputs.append(greedy(model, ids))
        assert_as_near_to_fp32(logits(model, probe), logits(reference, probe), logits(exact, probe))
        assert_same_up_to_near_ties(outputs[-1], reference, exact, ids.shape[1])
        model.offload.close()
    assert torch.equal(outputs[0], outputs[1]), "tokens depend on the budget"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_prompt_in_chunks_gives_the_same_tokens(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    ids = prompt(tokens=23, seed=4)
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=48, prefill_chunk=7)
    assert torch.equal(greedy(model, ids), expected)
    stats = model.offload.stats()
    # 23 tokens in pieces of 7 are 7 + 7 + 7 + 2; each of 15 further tokens is a pass of its own.
    assert (stats.prefill_tokens, stats.decode_tokens) == (23, 15)
    model.offload.close()


def test_fp16_computes(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    ids = prompt(seed=5)
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, dtype="float16")
    reference, exact = (logits(reference_model(directory, dtype), ids) for dtype in (torch.float16, torch.float32))
    assert_as_near_to_fp32(logits(model, ids), reference, exact)
    model.offload.close()


def test_a_cast_at_load_is_transformers_cast(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("mixtral", torch.bfloat16)
    ids = prompt(seed=6)
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, dtype=torch.float32)
    assert model.dtype is torch.float32
    assert torch.equal(greedy(model, ids), greedy(reference_model(directory, torch.float32), ids))
    model.offload.close()
