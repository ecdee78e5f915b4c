"""Models whose KV cache is attended to in part: exact where nothing is left out, and what was is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import examples.tiny_recall
import offload
from examples.tiny_recall.recall import recall_all
from examples.tiny_recall.task import tell_facts
from offload.errors import InvalidArgumentError, UnsupportedOperationError
from placement import kv
from placement.kv_settings import KvSettings
from tests.conftest import TinyCheckpoint
from tests.hf.reference import assert_logits_close, greedy, prompt, reference_model
from tests.kv.tables import SETTINGS

CONTEXT = 250
RECALL_MODEL = Path(examples.tiny_recall.__file__).parent / "model"
METHODS = ("top-k", "snapkv", "h2o")
Load = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "SETTINGS", SETTINGS)


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> Iterator[Load]:
    loaded: list[PreTrainedModel] = []

    def make(model_type: str, sparsity: str, **options: Any) -> PreTrainedModel:
        settings = {"ram": "1GiB", "context": CONTEXT, "batch": 2, **options}
        directory = tiny_checkpoint(model_type, torch.float32)
        loaded.append(offload.load(directory, nvme=store_root, kv_sparsity=sparsity, **settings))
        return loaded[-1]

    yield make
    for model in loaded:
        model.offload.check()
        model.offload.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_share_of_all_is_all(model_type: str, method: str, tiny_checkpoint: TinyCheckpoint, load: Load) -> None:
    reference, model = reference_model(tiny_checkpoint(model_type), torch.float32), load(model_type, f"{method}:1")
    ids = prompt(batch=2, tokens=CONTEXT - 20)
    padded = torch.ones_like(ids)
    padded[0, :25] = 0
    assert torch.equal(greedy(model, ids, 8), greedy(reference, ids, 8))
    options = {"attention_mask": padded, "prefill_chunk_size": 40, "new_tokens": 6}
    assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options))
    found = model.offload.stats().kv
    assert found.gathered == () and found.sparsity.refused == ()
    assert found.sparsity.sparse_steps == 0 < found.sparsity.full_steps
    assert found.sparsity.captured_mass is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_a_part_has_and_that_it_is_lossy_is_told(
    model_type: str, method: str, tiny_checkpoint: TinyCheckpoint, load: Load
) -> None:
    reference, model = reference_model(tiny_checkpoint(model_type), torch.float32), load(model_type, f"{method}:0.7")
    ids = prompt(batch=2, tokens=CONTEXT)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for first, end in ((0, 150), (150, 230), *((at, at + 1) for at in range(230, 240))):
        with torch.no_grad():
            expected, found = (
                one(ids[:, first:end], past_key_values=cache).logits[:, -1]
                for one, cache in zip((reference, model), caches, strict=True)
            )
    error = ((found - expected).norm() / expected.norm()).item()
    assert error > 1e-5
    told = model.offload.stats().kv.sparsity
    assert told.method == f"{method}:0.7" and told.sparse_steps > 0 and told.refused == ()
    assert 0.5 < told.captured_mass < 1
    assert (told.evicted_tokens > 0) == (method != "top-k")
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 240
    assert f"{method}:0.7 (lossy)" in str(model.offload.stats())
    assert model.offload.plan.kv.sparsity == f"{method}:0.7"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_ways_of_generating(method: str, options: dict[str, Any], load: Load) -> None:
    model = load("qwen3_moe", f"{method}:0.5", batch=3)
    ids = prompt(tokens=60).repeat(1, 3)
    torch.manual_seed(0)
    found = model.generate(ids, max_new_tokens=12, **options)
    assert found.shape[1] > ids.shape[1] and torch.equal(found[:, : ids.shape[1]], ids.expand(len(found), -1))
    assert model.offload.stats().kv.sparsity.sparse_steps > 0


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_what_was_evicted_cannot_be_had(method: str, load: Load) -> None:
    model = load("qwen3_moe", f"{method}:0.5")
    ids, cache = prompt(tokens=200), DynamicCache()
    with torch.no_grad():
        model(ids[:, :180], past_key_values=cache)
        model(ids[:, 180:181], past_key_values=cache)
        length = cache.get_seq_length()
        with pytest.raises(UnsupportedOperationError, match="evicted"):
            cache.crop(-170)
        assert cache.get_seq_length() == length
        with pytest.raises(UnsupportedOperationError, match="evicted"):
            _ = cache.layers[0].keys
        other = copy.deepcopy(cache)
        expected = model(ids[:, 181:190], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 181:190], past_key_values=other).logits, expected)


def test_of_a_model_that_computes_with_its_cache_itself_the_statistics_say_why(load: Load) -> None:
    model = load("qwen3_moe", "top-k:0.3")
    ids, cache = prompt(tokens=200), DynamicCache()
    with torch.no_grad():
        model(ids[:, :190], past_key_values=cache)
        with pytest.warns(match="attention weights are asked for"):
            model(ids[:, 190:191], past_key_values=cache, output_attentions=True)
    (reason,) = model.offload.stats().kv.sparsity.refused
    assert "attention weights are asked for" in reason


def test_saved_prefixes_keep_their_landmarks(load: Load) -> None:
    model = load("qwen3_moe", "top-k:0.3", prefix_cache="8MiB")
    ids = prompt(tokens=220)
    found = []
    for saved in (False, True):
        if saved:
            model.offload.save_prefix(ids[:, :200])
        cache = DynamicCache()
        with torch.no_grad():
            if saved:
                model.offload.prefixes.begin(cache, ids)
            else:
                model(ids[:, :200], past_key_values=cache)
            found.append(model(ids[:, 200:201], past_key_values=cache).logits)
    assert model.offload.stats().kv.sparsity.sparse_steps > 0
    assert_logits_close(found[1], found[0])


@pytest.mark.parametrize(
    "value", ["top-k", "top-k:", "top-k:0", "top-k:1.5", "top-k:nan", "best:0.5", "top-k:5%", "", 0.05, ["top-k:0.1"]]
)
def test_arguments_are_checked_at_the_door(value: Any, tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(InvalidArgumentError, match=r"kv_sparsity=.*top-k, snapkv, h2o and a share"):
        offload.plan(tiny_checkpoint("mixtral"), ram="1GiB", context=64, kv_sparsity=value)


def test_evicting_does_not_go_with_saved_prefixes(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="h2o evicts tokens that a saved prefix must hold"):
        offload.load(tiny_checkpoint("mixtral"), nvme=store_root, kv_sparsity="h2o:0.5", prefix_cache="1MiB")


def test_plans_count_landmarks(tiny_checkpoint: TinyCheckpoint) -> None:
    sizes = {"ram": "1GiB", "context": 100, "kv": "int8", "kv_ram": "1MiB"}
    without, with_top_k, evicting = (
        offload.plan(tiny_checkpoint("qwen3_moe"), kv_sparsity=sparsity, **sizes)
        for sparsity in (None, "top-k:0.05", "h2o:0.2")
    )
    # 7 blocks, 3 layers, 2 heads: middles, spreads, and factors and signs of 64 tokens, of 64 channels, twice for room.
    assert with_top_k.kv.landmarks_nbytes == 2 * 7 * 3 * 2 * (4 * 64 + 2 * 64 + 8 * 64)
    assert without.kv.sparsity is None and without.kv.landmarks_nbytes == evicting.kv.landmarks_nbytes == 0
    assert with_top_k.ram.kv_nbytes > without.ram.kv_nbytes
    assert offload.Plan.from_json(with_top_k.to_json()) == with_top_k


def test_a_twentieth_of_the_blocks_recalls_as_all_of_them_do(store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "SETTINGS", KvSettings())
    generator = torch.Generator().manual_seed(11)
    # Few kinds of token that tell nothing, and many.
    contexts = [tell_facts(8192, 20, generator, (4, 32)[number % 2]) for number in range(11)]
    found = []
    for options in ({"prefix_cache": 1}, {"kv_sparsity": "top-k:0.05", "kv_ram": "9MiB"}):
        model = offload.load(
            RECALL_MODEL, ram="1GiB", nvme=store_root, context=8256, dtype="float32", progress=False, **options
        )
        with model.offload as runtime:
            found.append(recall_all(model, contexts))
            told = runtime.stats().kv
    assert told.blocks_read > 0, "nothing went to disk"
    assert told.sparsity.sparse_steps == 2 * 220
    assert found[0].accuracy > 0.97
    assert abs(found[0].accuracy - found[1].accuracy) <= 0.01
    for full, part in zip(found[0].by_depth(4), found[1].by_depth(4), strict=True):
        assert abs(full - part) <= 0.04
