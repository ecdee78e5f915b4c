"""Dense models give what transformers gives, on the CPU and where layers stream through an accelerator's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.errors import (
    ClosedError,
    DoesNotFitError,
    InvalidArgumentError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from prefetch.policies.names import POLICIES
from tests.conftest import TinyCheckpoint
from tests.dense_models import DENSE_FAMILIES, LAYERS, write_dense
from tests.hf.reference import (
    PaddedBatch,
    assert_same_up_to_near_ties,
    greedy,
    prompt,
    reference_model,
)

NEW_TOKENS = 8
SHARES = (0.1, 0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """As `tiny_checkpoint`, of dense families."""
    known: dict[tuple[str, torch.dtype], Path] = {}

    def write(model_type: str, dtype: torch.dtype = torch.float32) -> Path:
        if (model_type, dtype) not in known:
            known[model_type, dtype] = write_dense(tmp_path_factory.mktemp(model_type), model_type, dtype)
        return known[model_type, dtype]

    return write


@pytest.fixture
def llama(dense_checkpoint: TinyCheckpoint) -> Path:
    return dense_checkpoint("llama")


def _streams(directory: Path, share: float, **options: Any) -> dict[str, Any]:
    """Options with which so much of the dense weights fit above."""
    dense = offload.plan(directory, ram="1GiB", **options).ram.dense_nbytes
    return {"device": "host", "vram": int(share * dense), "link": "100GB/s"}


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_tokens_equal_transformers_wherever_weights_are(
    model_type: str, dense_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    directory = dense_checkpoint(model_type)
    expected = PaddedBatch(directory, NEW_TOKENS)
    seen, copied, kept = [], [], []
    sizes: dict[str, Any] = {"context": 40, "batch": 2}
    for share in (None, *SHARES, 1.1):
        above = {} if share is None else _streams(directory, share, **sizes)
        model = offload.load(directory, ram="1GiB", nvme=tmp_path, **sizes, **above)
        with model.offload as runtime:
            seen.append(expected.checked_logits(model))
            runtime.reset_stats()
            expected.check_tokens(model)
            runtime.check()
            stats, plan = runtime.stats(), runtime.plan
            assert (plan.expert_count, plan.ram_slots, plan.disk_nbytes, stats.moe_steps) == (0, 0, 0, 0)
            if plan.vram is None:
                continue
            layer = max(one.dense_nbytes for one in runtime.spec.layers)
            streamed = LAYERS - len(plan.vram.dense_layers)
            passes = 2 * NEW_TOKENS
            copied.append(stats.accelerator.dense_bytes_copied)
            kept.append(streamed)
            if share < 1:
                assert plan.vram.window_layers == 2
                assert plan.vram.use.total_nbytes <= plan.vram.budget_nbytes
                # What was in the window when counting began is not copied again, and the next pass is begun.
                assert (passes * streamed - 2) * layer * 0.9 <= copied[-1] <= (passes * streamed + 2) * layer * 1.1
    assert kept == sorted(kept, reverse=True)
    assert (kept[0] >= 0.9 * LAYERS, kept[-1], copied[-1]) == (True, 0, 0)
    assert all(torch.equal(seen[0], other) for other in seen), "logits depend on where weights are"
    assert not list(tmp_path.iterdir()), "a dense model has no store"


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_bf16_equals_transformers_up_to_near_ties(model_type: str, dense_checkpoint: TinyCheckpoint) -> None:
    directory = dense_checkpoint(model_type, torch.bfloat16)
    reference, exact = (reference_model(directory, dtype) for dtype in (torch.bfloat16, torch.float32))
    ids = prompt(seed=3)
    outputs = []
    for above in ({}, _streams(directory, 0.4, context=40)):
        model = offload.load(directory, ram="1GiB", context=40, **above)
        with model.offload:
            assert model.dtype is torch.bfloat16
            outputs.append(greedy(model, ids))
            assert_same_up_to_near_ties(outputs[-1], reference, exact, ids.shape[1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("quant", ["int8", "int4", {"dense": "fp8_e4m3"}, {"lm_head": "int8", "dense": "mxfp4"}])
def test_packed_layers_stream_too(quant: Any, llama: Path) -> None:
    """The same tokens wherever they are."""
    sizes = {"context": 40, "quant": quant}
    plain = offload.plan(llama, ram="1GiB", context=40)
    outputs = []
    for share in (None, 0.25, 0.6, 1.1):
        above = {} if share is None else _streams(llama, share, **sizes)
        model = offload.load(llama, ram="1GiB", **sizes, **above)
        with model.offload as runtime:
            assert runtime.plan.dense_format == (quant if isinstance(quant, str) else quant["dense"])
            outputs.append(greedy(model, prompt()))
            if share is not None and share < 1:
                assert runtime.stats().accelerator.dense_bytes_copied
            elif share is None:
                assert runtime.plan.ram.dense_nbytes < 0.5 * plain.ram.dense_nbytes
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "int8"},
        {"kv": "int8", "kv_vram": 0},
        {"kv_sparsity": "top-k:0.5"},
        {"prefill_chunk": 7},
        {"prefetch": True},
        {"fused": False},
        {"attn_implementation": "eager"},
        *({"policy": policy} for policy in POLICIES),
    ],
    ids=str,
)
def test_what_is_asked_for_beside_changes_no_token(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """Options of experts mean nothing; those of the KV cache what they always do, in 33 tokens nothing lossy."""
    expected = greedy(reference_model(llama, torch.float32), prompt())
    above = _streams(llama, 0.5, context=40)
    for where in ({}, above):
        if "kv_vram" in options and not where:
            continue
        model = offload.load(llama, ram="1GiB", nvme=tmp_path, context=40, **options, **where)
        with model.offload as runtime:
            assert torch.equal(greedy(model, prompt()), expected)
            assert (runtime.paging is not None) == any(name.startswith("kv") for name in options)
            assert not runtime.stats().prefetching


def test_what_a_run_says(llama: Path, tmp_path: Path) -> None:
    model = offload.load(llama, ram="1GiB", nvme=tmp_path, context=40, **_streams(llama, 0.5, context=40))
    runtime = model.offload
    greedy(model, prompt())
    stats = runtime.stats()
    assert "of dense weights streamed" in str(stats)
    assert "hit rate" not in str(stats)
    assert stats.as_dict()["accelerator"]["dense_bytes_copied"] > 0
    runtime.reset_stats()
    assert runtime.stats().accelerator.dense_bytes_copied == 0
    model(prompt(tokens=9))
    assert "prefill, dense, attention, overhead, link, ms a token" in str(runtime.report())
    assert "experts" not in str(runtime.report())
    assert "<table>" in runtime.report()._repr_html_()
    assert "dense" in repr(runtime)
    with pytest.raises(UnsupportedOperationError, match="no routing"):
        runtime.record_trace()
    runtime.close()
    runtime.close()
    with pytest.raises(ClosedError):
        model(prompt())


def test_prefixes_are_those_of_the_weights(dense_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Two models in memory that differ in one weight do not take each other's."""
    directory = dense_checkpoint("llama")
    ids = prompt(tokens=24)
    saved = ids[:, :16]
    for changed in (False, True):
        made = AutoModelForCausalLM.from_pretrained(directory).eval()
        if changed:
            with torch.no_grad():
                made.model.layers[3].mlp.up_proj.weight[0, 0] += 1
        expected = greedy(made, ids)
        model = offload.load(made, ram="1GiB", nvme=tmp_path, context=64, prefix_cache="10MiB")
        with model.offload as runtime:
            assert torch.equal(greedy(model, ids), expected)
            assert runtime.stats().prefix.reused == 0
            runtime.save_prefix(saved)
            assert torch.equal(greedy(model, ids), expected)
            assert runtime.stats().prefix.reused == 1


def test_decode_steps_are_replayed_where_all_is_above(llama: Path) -> None:
    expected = greedy(reference_model(llama, torch.float32), prompt())
    above = _streams(llama, 1.5, context=40)
    model = offload.load(llama, ram="1GiB", context=40, step_graph=True, **above)
    with model.offload as runtime:
        assert torch.equal(greedy(model, prompt()), expected)
        assert torch.equal(greedy(model, prompt()), expected)
        graphs = runtime.stats().graphs
        assert (graphs.captured, graphs.reason) == (1, "")
        assert graphs.replayed >= 28


def test_too_little_of_either_memory_is_refused_with_what_would_do(llama: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r'dense weights.*quant="int4", with which dense weights take about') as (
        caught
    ):
        offload.load(llama, ram="1MiB", context=40)
    least = caught.value.minimum_ram_bytes
    with pytest.raises(DoesNotFitError):
        offload.load(llama, ram=least - 1, context=40)
    model = offload.load(llama, ram=least, context=40)
    with model.offload as runtime:
        greedy(model, prompt())
        with pytest.raises(DoesNotFitError, match="tokens"):
            model(prompt(batch=64, tokens=200))
        assert runtime.plan.peak_ram_nbytes <= least
    with pytest.raises(DoesNotFitError, match=r"a window of dense layers [\d,]+; there are") as caught:
        offload.load(llama, ram="1GiB", context=40, device="host", vram="8KiB")
    needed = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    with pytest.raises(DoesNotFitError):
        offload.load(llama, ram="1GiB", context=40, device="host", vram=needed - 1)
    model = offload.load(llama, ram="1GiB", context=40, device="host", vram=needed)
    with model.offload as runtime:
        assert runtime.plan.vram.dense_layers == ()
        greedy(model, prompt(), new_tokens=2)


def test_formats_of_what_is_not_there_are_refused(dense_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(InvalidArgumentError, match="dense model without experts"):
        offload.load(dense_checkpoint("llama"), ram="1GiB", quant={"experts": "int4"})
    for quant in ("int8", {"dense": "int4"}):
        with pytest.raises(InvalidArgumentError, match="found Conv1D"):
            offload.load(dense_checkpoint("gpt2"), ram="1GiB", quant=quant)
    model = offload.load(dense_checkpoint("gpt2"), ram="1GiB", context=40, quant={"lm_head": "int8"})
    with model.offload as runtime:
        assert runtime.plan.head_format == "int8"
        assert greedy(model, prompt()).shape == (1, 33)


def test_experts_of_another_form_are_no_dense_model(tmp_path: Path) -> None:
    more = {"num_hidden_layers": 2, "is_moe": True, "num_experts": 16}
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "doge", vocab_size=99, hidden_size=48, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, **more,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config).eval()
    made.save_pretrained(tmp_path)
    for model in (tmp_path, made):
        with pytest.raises(UnsupportedModelError, match="DogeCDMoE"):
            offload.load(model, ram="1GiB")
