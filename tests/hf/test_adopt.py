"""What the returned model does besides `generate`."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import offload
from offload.errors import ClosedError, DoesNotFitError, UnsupportedOperationError
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.hf.tokenizers import tiny_tokenizer

CONTEXT = 64


@pytest.fixture
def directory(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture
def model(directory: Path, store_root: Path) -> Iterator[PreTrainedModel]:
    loaded = offload.load(directory, ram="1GiB", nvme=store_root, context=CONTEXT)
    yield loaded
    loaded.offload.close()


@pytest.fixture
def reference(directory: Path) -> PreTrainedModel:
    return reference_model(directory, torch.float32)


def test_it_is_the_transformers_class_ready_to_run(model: PreTrainedModel) -> None:
    assert type(model) is Qwen3MoeForCausalLM
    assert not model.training
    assert model.device == torch.device("cpu")
    assert model.dtype is torch.float32
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    assert not [name for name, _ in tensors if ".experts." in name]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_dense_weights_and_buffers_are_transformers_own(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type, torch.bfloat16)
    loaded = offload.load(directory, ram="1GiB", nvme=store_root, context=CONTEXT)
    expected = reference_model(directory, torch.bfloat16)
    for kind in ("named_parameters", "named_buffers"):
        theirs = {n: t for n, t in getattr(expected, kind)(remove_duplicate=False) if ".experts." not in n}
        ours = dict(getattr(loaded, kind)(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    loaded.offload.close()


def test_the_checkpoints_generation_config_is_taken(directory: Path, tmp_path: Path, store_root: Path) -> None:
    import shutil

    shutil.copytree(directory, tmp_path / "model")
    GenerationConfig(max_new_tokens=3, do_sample=False, repetition_penalty=1.5).save_pretrained(tmp_path / "model")
    loaded = offload.load(tmp_path / "model", ram="1GiB", nvme=store_root, context=CONTEXT)
    assert loaded.generation_config.repetition_penalty == 1.5
    assert loaded.generate(prompt()).shape[1] == prompt().shape[1] + 3
    loaded.offload.close()


def test_prompt_lookup_gives_the_same_tokens(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = prompt(tokens=8, seed=2).repeat(1, 3)
    expected = greedy(reference, ids)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4), expected)


def test_sampling_and_beams_give_the_same_tokens(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = prompt()
    for options in ({"do_sample": True, "temperature": 0.9, "top_p": 0.9}, {"do_sample": False, "num_beams": 3}):
        outputs = []
        for candidate in (model, reference):
            torch.manual_seed(7)
            outputs.append(candidate.generate(ids, max_new_tokens=8, **options))
        assert torch.equal(*outputs)


def test_without_a_cache(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = prompt()
    assert torch.equal(greedy(model, ids, 4, use_cache=False), greedy(reference, ids, 4, use_cache=False))


def test_inputs_embeds(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    embeds = reference.get_input_embeddings()(prompt()).detach()
    with torch.no_grad():
        assert torch.allclose(model(inputs_embeds=embeds).logits, reference(inputs_embeds=embeds).logits, atol=1e-5)


def test_pipeline_and_streamers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    text = "abc abd"
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer(text, return_tensors="pt")
    expected = tokenizer.decode(greedy(reference, ids["input_ids"], 6)[0, ids["input_ids"].shape[1] :])
    found = generate(text, max_new_tokens=6, do_sample=False, return_full_text=False)
    # How characters are joined to text is the tokenizer's affair.
    assert found[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    options = {**ids, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    assert "".join(streamer).replace(" ", "") == expected.replace(" ", "")
    thread.join()


def test_two_threads_generate_at_once(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    prompts = [prompt(seed=seed) for seed in range(4)]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, greedy(model, prompts[i])))
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, ids in enumerate(prompts):
        assert torch.equal(found[index], greedy(reference, ids))
    model.offload.check()


@pytest.mark.parametrize("same", ["cpu", torch.device("cpu"), torch.float32])
def test_moves_that_change_nothing_return_the_model(model: PreTrainedModel, same: object) -> None:
    assert model.to(same) is model
    assert model.cpu() is model
    assert model.float() is model


@pytest.mark.parametrize(
    "call",
    [
        lambda m, _: m.to("cuda"),
        lambda m, _: m.cuda(),
        lambda m, _: m.to(torch.bfloat16),
        lambda m, _: m.to(device="cpu", dtype=torch.float16),
        lambda m, _: m.half(),
        lambda m, _: m.bfloat16(),
        lambda m, _: m.double(),
        lambda m, path: m.save_pretrained(path),
        lambda m, _: m.state_dict(),
        lambda m, _: m.load_state_dict({}),
        lambda m, _: copy.deepcopy(m),
        lambda m, _: pickle.dumps(m.offload),
    ],
)
def test_what_cannot_mean_anything_is_refused(model: PreTrainedModel, tmp_path: Path, call: object) -> None:
    with pytest.raises(UnsupportedOperationError, match="offloaded model"):
        call(model, tmp_path / "out")  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
    greedy(model, prompt(), 2)


def test_another_gpu_is_another_device(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 1))
    for same in (model.to("cuda"), model.to("cuda:1"), model.cuda(), model.cuda(1)):
        assert same is model
    for move in (lambda: model.to("cuda:0"), lambda: model.cuda(0), lambda: model.cuda(torch.device("cuda", 2))):
        with pytest.raises(UnsupportedOperationError, match="offloaded model"):
            move()


def test_statistics_count_what_happened(directory: Path, store_root: Path) -> None:
    plan = offload.plan(directory, ram="1GiB", context=CONTEXT)
    tight = plan.minimum_ram_nbytes + 4 * plan.slot_nbytes
    loaded = offload.load(directory, ram=tight, nvme=store_root, context=CONTEXT)
    ids = prompt(tokens=9)
    greedy(loaded, ids, 5)
    stats = loaded.offload.stats()
    layers = len(loaded.offload.layers)
    assert (stats.prefill_tokens, stats.decode_tokens) == (9, 4)
    assert stats.moe_steps == 5 * layers
    assert stats.hits + stats.misses >= stats.moe_steps
    assert stats.bytes_read == stats.misses * loaded.offload.layers[0].layout.nbytes
    assert stats.misses - stats.evictions == loaded.offload.plan.ram_slots
    assert 0 <= stats.hit_rate < 1
    assert stats.decode_s > 0
    assert set(stats.as_dict()) >= {"hits", "misses", "bytes_read", "read_stall_s", "decode_tokens_per_s"}
    loaded.offload.reset_stats()
    assert loaded.offload.stats().hits == loaded.offload.stats().bytes_read == 0
    loaded.offload.close()


def test_a_longer_sequence_takes_slots_and_gives_them_back(directory: Path, store_root: Path) -> None:
    plan = offload.plan(directory, ram="1GiB", context=16)
    everything = plan.peak_ram_nbytes
    loaded = offload.load(directory, ram=everything, nvme=store_root, context=16)
    reference = reference_model(directory, torch.float32)
    runtime = loaded.offload
    assert runtime.stats().slots == plan.expert_count
    long = prompt(tokens=60)
    assert torch.allclose(logits(loaded, long), logits(reference, long), atol=1e-4)
    assert runtime.stats().slots < plan.expert_count
    runtime.check()
    short = prompt(tokens=4)
    assert torch.equal(greedy(loaded, short, 4), greedy(reference, short, 4))
    assert runtime.stats().slots == plan.expert_count
    runtime.check()
    loaded.offload.close()


def test_a_sequence_beyond_the_budget_is_refused_and_the_next_one_works(directory: Path, store_root: Path) -> None:
    minimum = offload.plan(directory, ram="1GiB", context=16).minimum_ram_nbytes
    loaded = offload.load(directory, ram=minimum, nvme=store_root, context=16)
    with pytest.raises(DoesNotFitError, match="ram=") as caught:
        loaded(prompt(batch=64, tokens=200), logits_to_keep=1)
    enough = caught.value.minimum_ram_bytes
    greedy(loaded, prompt(tokens=4), 2)
    loaded.offload.close()
    larger = offload.load(directory, ram=enough, nvme=store_root, context=16)
    logits_of_last = larger(prompt(batch=64, tokens=200), logits_to_keep=1).logits
    assert torch.isfinite(logits_of_last).all()
    larger.offload.close()


def test_after_close_the_model_says_so(directory: Path, store_root: Path) -> None:
    loaded = offload.load(directory, ram="1GiB", nvme=store_root, context=CONTEXT)
    with loaded.offload:
        greedy(loaded, prompt(), 2)
    loaded.offload.close()
    with pytest.raises(ClosedError, match="load the model again"):
        greedy(loaded, prompt(), 2)
    with pytest.raises(ClosedError):
        loaded(prompt())


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    embeds = model.get_input_embeddings()(prompt()).detach().requires_grad_()
    with pytest.raises(UnsupportedOperationError, match="gradients"):
        model(inputs_embeds=embeds)
    with torch.no_grad():
        model(inputs_embeds=embeds)


def test_caches_that_are_alive_count(directory: Path, store_root: Path) -> None:
    plan = offload.plan(directory, ram="1GiB", context=16)
    loaded = offload.load(directory, ram=plan.peak_ram_nbytes, nvme=store_root, context=16)
    kept = [
        loaded(prompt(tokens=16), use_cache=True, past_key_values=DynamicCache(config=loaded.config)) for _ in range(4)
    ]
    loaded(prompt(tokens=4))
    fewer = loaded.offload.stats().slots
    assert fewer < plan.expert_count
    del kept
    loaded(prompt(tokens=4))
    assert loaded.offload.stats().slots == plan.expert_count
    loaded.offload.close()
