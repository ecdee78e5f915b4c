"""Models with a KV cache in blocks, most of it on disk, give what transformers gives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import offload
from offload.errors import DoesNotFitError, InvalidArgumentError, StorageError
from offload.hf.fused.stack_tape import StackTape
from offload.hf.paged.layer import PagedLayer
from offload.request import FUSED_KINDS
from placement import kv
from tests.conftest import TinyCheckpoint
from tests.hf.reference import (
    assert_logits_close,
    assert_same_up_to_near_ties,
    greedy,
    prompt,
    reference_model,
)
from tests.kv.tables import SETTINGS, hand_over_reads
from tests.tiny_models import ARCHITECTURES, build_tiny

CONTEXT = 220
SOME = ("qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "SETTINGS", SETTINGS)


def _least_kv_ram(directory: Path, **options: Any) -> int:
    with pytest.raises(InvalidArgumentError, match="two segments to read into") as caught:
        offload.load(directory, kv_ram=1, **options)
    return int(str(caught.value).split("take ")[1].split(" ")[0].replace(",", ""))


Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> Iterator[Load]:
    """`load(model_type, dtype, **options)`: with as little memory for the KV cache as works."""
    loaded: list[PreTrainedModel] = []

    def make(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
        directory = tiny_checkpoint(model_type, dtype)
        settings = {"ram": "1GiB", "nvme": store_root, "context": CONTEXT, "batch": 2, **options}
        if "kv_ram" not in settings:
            settings["kv_ram"] = _least_kv_ram(directory, **settings)
        model = offload.load(directory, **settings)
        loaded.append(model)
        return model

    yield make
    for model in loaded:
        model.offload.check()
        model.offload.close()


def _assert_paged(model: PreTrainedModel) -> None:
    found = model.offload.stats().kv
    assert found is not None and found.paged_steps > 0
    assert found.gathered == (), found.gathered
    assert found.blocks_written > 0 and found.blocks_read > 0, "nothing went to disk: the test shows nothing"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fp32_equals_transformers(model_type: str, tiny_checkpoint: TinyCheckpoint, load: Load) -> None:
    reference, model = reference_model(tiny_checkpoint(model_type), torch.float32), load(model_type)
    ids = prompt(batch=2, tokens=CONTEXT - 20)
    padded = torch.ones_like(ids)
    padded[0, :25] = 0
    plan = model.offload.plan.kv
    if model_type not in ("gpt_oss", "qwen3_next"):
        # Of these two, one layer of three is paged: what blocks need at least is more than a quarter of that.
        assert plan.ram_nbytes <= 2 * CONTEXT * plan.nbytes_per_token // 4
    assert torch.equal(greedy(model, ids, 8), greedy(reference, ids, 8))
    options = {"attention_mask": padded, "prefill_chunk_size": 40, "new_tokens": 6}
    assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options))
    _assert_paged(model)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fp32_equals_transformers_with_an_accelerator(
    model_type: str, tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    """The newest blocks above, others in RAM and on disk, and experts and dense weights on three tiers as well."""
    directory = tiny_checkpoint(model_type)
    reference, ids = reference_model(directory, torch.float32), prompt(batch=2, tokens=CONTEXT - 20)
    plan = offload.plan(directory, ram="1GiB", context=CONTEXT, batch=2)
    above = {"device": "host", "link": "10GB/s", "vram": plan.ram.dense_nbytes + 4 * plan.slot_nbytes + (512 << 10)}
    model = load(model_type, kv_vram="128KiB", **above)
    made = model.offload.plan
    assert made.kv.vram_nbytes > 0 and made.vram.use.kv_nbytes == made.kv.vram_nbytes
    assert torch.equal(greedy(model, ids, 8), greedy(reference, ids, 8))
    padded = torch.ones_like(ids)
    padded[0, :25] = 0
    options = {"attention_mask": padded, "prefill_chunk_size": 40, "new_tokens": 6}
    assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options))
    found = model.offload.stats().kv
    assert found.gathered == (), found.gathered
    assert found.accelerated_steps > 0 and found.blocks_moved > 0 and found.bytes_moved > 0
    assert found.vram_nbytes > 0 and found.ram_nbytes > 0


@pytest.mark.parametrize("three_tiers", [False, True], ids=["RAM and disk", "accelerator"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bf16_equals_transformers_up_to_near_ties(
    model_type: str, three_tiers: bool, tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    directory = tiny_checkpoint(model_type, torch.bfloat16)
    reference = reference_model(directory, torch.bfloat16, "grouped_mm")
    exact = reference_model(directory, torch.float32)
    above = {"device": "host", "vram": "2MiB", "kv_vram": "64KiB"} if three_tiers else {}
    model, ids = load(model_type, torch.bfloat16, **above), prompt(tokens=CONTEXT - 20, seed=3)
    found = greedy(model, ids, 16)
    assert_same_up_to_near_ties(found, reference, exact, ids.shape[1])
    if three_tiers:
        stats = model.offload.stats().kv
        assert stats.gathered == () and stats.accelerated_steps > 0 and stats.blocks_moved > 0
    else:
        _assert_paged(model)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["beams", "lookup", "returned"],
)
def test_ways_of_generating(
    model_type: str, options: dict[str, Any], tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    reference, model = reference_model(tiny_checkpoint(model_type), torch.float32), load(model_type, batch=3)
    # What repeats can be looked up.
    ids = prompt(tokens=40).repeat(1, 3)
    assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2", "mixtral"])
def test_a_cache_by_hand(model_type: str, tiny_checkpoint: TinyCheckpoint, load: Load) -> None:
    reference, model = reference_model(tiny_checkpoint(model_type), torch.float32), load(model_type)
    ids = prompt(batch=2, tokens=CONTEXT)
    caches = [DynamicCache(config=model.config) for model in (reference, model)]

    def both(first: int, end: int) -> None:
        with torch.no_grad():
            expected, found = (
                one(ids[:, first:end], past_key_values=cache).logits
                for one, cache in zip((reference, model), caches, strict=True)
            )
        assert_logits_close(found, expected)

    both(0, 100)
    both(100, 130)
    both(130, 132)
    both(132, 133)
    assert any(type(layer) is PagedLayer for layer in caches[1].layers)
    copied = copy.deepcopy(caches)
    both(133, 140)
    caches = copied
    both(133, 150)
    for cache in caches:
        cache.crop(-70)
        cache.reorder_cache(torch.tensor([1, 1]))
    ids[0] = ids[1]
    both(80, 81)
    both(81, 120)
    _assert_paged(model)


def test_a_cache_that_grew_in_place_is_taken_over(tiny_checkpoint: TinyCheckpoint, load: Load) -> None:
    reference, model = reference_model(tiny_checkpoint("qwen3_moe"), torch.float32), load("qwen3_moe")
    ids = prompt(tokens=120)
    with torch.no_grad():
        cache = reference(ids[:, :100], use_cache=True).past_key_values
        expected = reference(ids[:, 100:], past_key_values=copy.deepcopy(cache)).logits
        found = model(ids[:, 100:], past_key_values=cache).logits
    assert_logits_close(found, expected)


def test_tokens_do_not_depend_on_the_memory(tiny_checkpoint: TinyCheckpoint, load: Load) -> None:
    ids, found = prompt(batch=2, tokens=CONTEXT - 20), []
    above = {"device": "host", "vram": "2MiB"}
    for options in ({}, {"kv_ram": "400KiB"}, {**above, "kv_vram": "100KiB"}, above):
        model = load("qwen3_moe", torch.bfloat16, kv="int8", **options)
        with torch.no_grad():
            cache = DynamicCache()
            model(ids[:, :-1], past_key_values=cache)
            found.append(model(ids[:, -1:], past_key_values=cache).logits)
        stats = model.offload.stats().kv
        assert (stats.accelerated_steps > 0) == ("vram" in options)
        # What the plan gives by itself is all that is needed.
        assert (stats.ram_nbytes == 0) == (options is above)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("batch", "options"),
    [(2, {}), (1, {"kv": "int8"}), (2, {"kv_sparsity": "top-k:0.3"}), (1, {"kv": "int8", "kv_ram": "1MiB"})],
    ids=["plain", "packed", "sparse", "in RAM"],
)
def test_the_tape_has_the_bits_of_the_layers(
    batch: int, options: dict[str, Any], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention between rows of a tape, beside a pass layer by layer."""
    played: list[object] = []
    attend_by = StackTape.attend_by

    def counting(tape: StackTape, attend: Any) -> None:
        played.append(tape)
        attend_by(tape, attend)

    monkeypatch.setattr(StackTape, "attend_by", counting)
    ids, found = prompt(batch=batch, tokens=CONTEXT), []
    for fused in (FUSED_KINDS, [kind for kind in FUSED_KINDS if kind != "decoder"]):
        model, logits, cache = load("qwen3_moe", torch.bfloat16, fused=fused, **options), [], DynamicCache()
        played.clear()
        with torch.no_grad():
            for first, end in ((0, 120), (120, 180), *((i, i + 1) for i in range(180, CONTEXT))):
                logits.append(model(ids[:, first:end], past_key_values=cache).logits[:, -1])
            cache.crop(-10)
            logits.append(model(ids[:, :1], past_key_values=cache).logits[:, -1])
        assert len(played) == (CONTEXT - 180 + 1 if "decoder" in fused else 0)
        found.append(torch.stack(logits))
    assert torch.equal(*found)


def test_the_blocks_of_a_cache_that_is_gone_are_free(load: Load) -> None:
    """A tape that attended to it last does not hold on to it."""
    model, cache = load("qwen3_moe", torch.bfloat16, batch=1, kv_ram="64MiB", kv="int8"), DynamicCache()
    ids = prompt(batch=1, tokens=40)
    with torch.no_grad():
        for first, end in (0, 38), (38, 39), (39, 40):
            model(ids[:, first:end], past_key_values=cache)
    pool = model.offload.paging.pool
    assert pool.tiers_nbytes()[1] > 0
    del cache
    gc.collect()
    with pool.lock:
        pool.release_abandoned()
    assert pool.tiers_nbytes() == (0, 0, 0)


def test_a_disk_that_fails_ends_in_a_typed_error_and_the_next_call_works(
    tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    reference, model = reference_model(tiny_checkpoint("mixtral"), torch.float32), load("mixtral")
    ids = prompt(batch=2, tokens=CONTEXT - 20)
    expected = greedy(reference, ids, 4)
    assert torch.equal(greedy(model, ids, 4), expected)
    pool = model.offload.paging.pool
    reads, writes = pool.staging.reader._preadv, pool.file._pwrite

    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    hand_over_reads(pool)
    pool.staging.reader._preadv = failing
    with pytest.raises(StorageError, match="Input/output"):
        greedy(model, ids, 4)
    pool.staging.reader._preadv, pool.file._pwrite = reads, failing
    with pytest.raises(StorageError, match="Input/output"):
        greedy(model, ids, 4)
    pool.file._pwrite = writes
    assert torch.equal(greedy(model, ids, 4), expected)


@pytest.mark.parametrize(
    ("model_type", "format", "bound"),
    [
        *((model_type, "int8", 0.02) for model_type in ARCHITECTURES),
        *((model_type, format, bound) for model_type in SOME for format, bound in (("fp8", 0.05), ("bf16", 0.01))),
    ],
)
def test_lossy_formats_stay_within_their_bounds(
    model_type: str, format: str, bound: float, tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    model = load(model_type, kv=format)
    error = _error(model, reference_model(tiny_checkpoint(model_type), torch.float32))
    assert 0 < error < bound, error
    assert model.offload.plan.kv.lossy


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_int4_stays_within_its_bound(
    model_type: str, tmp_path: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "SETTINGS", replace(SETTINGS, block_tokens=64, recent_tokens=64, segment_blocks=1))
    reference = build_tiny(model_type)
    if "deepseek" in model_type:
        # Groups of 32 channels that are keys and values alike.
        reference = type(reference)(type(reference.config)(**reference.config.to_dict() | {"kv_lora_rank": 32})).eval()
    reference.save_pretrained(tmp_path)
    model = offload.load(tmp_path, ram="1GiB", nvme=store_root, context=CONTEXT, batch=2, kv="int4")
    error = _error(model, reference)
    assert 0 < error < 0.15, error
    model.offload.close()


def _error(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    """Relative error of the logits of tokens that are fed one by one after prompts.

    Of the median token: where a router nearly ties, rounding sends a token to another expert.
    """
    ids, found = prompt(batch=2, tokens=CONTEXT), []
    with torch.no_grad():
        expected = reference(ids).logits[:, -10:]
        cache = DynamicCache(config=model.config)
        for first, end in ((0, 100), (100, CONTEXT - 10), *((i, i + 1) for i in range(CONTEXT - 10, CONTEXT))):
            found.append(model(ids[:, first:end], past_key_values=cache).logits[:, -1])
    assert model.offload.stats().kv.gathered == ()
    return ((torch.stack(found[2:], 1) - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def test_latents_that_are_no_whole_groups_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "SETTINGS", replace(SETTINGS, block_tokens=64, recent_tokens=64))
    refusal = (
        r'kv="int4": layer 0 of .* latents of 24 channels, of which values are the first 16.* no blocks of int4: '
        r".*multiple of 16 \(32 of int4\).*Fix: .*: auto, bf16, fp16, fp32, fp8, int8$"
    )
    with pytest.raises(InvalidArgumentError, match=refusal):
        offload.load(tiny_checkpoint("deepseek_v3"), ram="1GiB", context=CONTEXT, kv="int4")


def test_the_default_keeps_the_cache_that_grows_in_place(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    with offload.load(tiny_checkpoint("mixtral"), ram="1GiB", nvme=store_root, context=64).offload as runtime:
        assert runtime.plan.kv is None and runtime.stats().kv is None


@pytest.mark.parametrize(
    "options", [{"kv": "int3"}, {"kv": 8}, {"kv": None}, {"kv_ram": "lots"}, {"kv_ram": 0}, {"kv_ram": 4096}]
)
def test_arguments_are_checked_at_the_door(options: dict[str, Any], tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(InvalidArgumentError, match="kv"):
        offload.plan(tiny_checkpoint("mixtral"), ram="1GiB", context=64, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_vram": "1MiB"}, 'goes with device="cuda", or with device="host" and vram='),
        ({"kv_vram": "much", "device": "host", "vram": "1MiB"}, "kv_vram="),
        ({"kv_vram": False, "device": "host", "vram": "1MiB"}, "kv_vram="),
        ({"kv_vram": 100, "device": "host", "vram": "1MiB"}, "a block of the KV cache takes"),
        ({"kv_vram": "64KiB", "kv_sparsity": "h2o:0.5", "device": "host", "vram": "1MiB"}, "give one of them"),
    ],
)
def test_memory_above_is_checked_at_the_door(
    options: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        offload.load(tiny_checkpoint("mixtral"), ram="1GiB", nvme=store_root, context=64, **options)


def test_more_above_than_there_is(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    options = {"ram": "1GiB", "nvme": store_root, "context": 640, "device": "host", "vram": "64KiB"}
    with pytest.raises(DoesNotFitError, match=r"kv_vram=\d+ leaves no room in vram="):
        offload.load(tiny_checkpoint("mixtral"), kv_vram="1MiB", **options)
    with offload.load(tiny_checkpoint("mixtral"), kv="int8", kv_vram=0, **options).offload as runtime:
        assert runtime.plan.kv is not None and runtime.plan.kv.vram_nbytes == 0
