"""Three tiers without a GPU: host memory plays the accelerator, and every family gives what transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.bench import Amount, predict_run
from offload.errors import DeviceError, DoesNotFitError, InvalidArgumentError
from placement.datasheets import datasheet
from prefetch.policies.lru import LruPolicy
from prefetch.scheduler.records import LayerCosts
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.tiny_models import ARCHITECTURES

CHEAP_COPIES = LayerCosts(cpu_token_s=1.0, gpu_expert_s=1e-3, link_expert_s=1e-9)


def _minimum_ram(directory: Path) -> int:
    with pytest.raises(DoesNotFitError) as caught:
        offload.plan(directory, ram=1, context=40, batch=2)
    return caught.value.minimum_ram_bytes


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tokens_equal_transformers_whatever_is_where(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    ids = prompt(batch=2)
    expected = greedy(reference_model(directory, torch.float32), ids)
    minimum = _minimum_ram(directory)
    plan = offload.plan(directory, ram=minimum, context=40, batch=2)
    slot, dense = plan.slot_nbytes, plan.ram.dense_nbytes
    seen, windows = [], []
    # One slot and nothing else; dense weights that stream beside a few; all of them beside more.
    for ram, vram, link in (
        (minimum, slot, "1MB/s"),
        (minimum + slot, dense + 2 * slot, "1GB/s"),
        (minimum, dense + 4 * slot + (64 << 10), "100GB/s"),
    ):
        model = offload.load(
            directory, ram=ram, nvme=store_root, context=40, batch=2, device="host", vram=vram, link=link
        )
        with model.offload as runtime:
            seen.append(logits(model, ids))
            assert torch.equal(greedy(model, ids), expected)
            runtime.check()
            stats = runtime.stats()
            assert stats.accelerator is not None
            assert stats.accelerator.slots == runtime.plan.vram.slots
            assert stats.accelerator.hits
            windows.append(runtime.plan.vram.window_layers)
            assert (runtime.dense is not None) == runtime.plan.vram.head
            assert (stats.accelerator.dense_bytes_copied > 0) == (windows[-1] > 0)
    assert windows[-2:] == [2, 0], "dense weights stream and then do not"
    assert runtime.plan.ram.dense_nbytes == 0
    plain = offload.load(directory, ram="1GiB", nvme=store_root, context=40, batch=2)
    with plain.offload:
        seen.append(logits(plain, ids))
    assert all(torch.equal(seen[0], other) for other in seen), "logits depend on the tiers"


def test_nothing_is_read_where_all_experts_fit_above(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("mixtral")
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, device="host", vram="1GiB")
    with model.offload as runtime:
        runtime.reset_stats()
        logits(model, prompt())
        stats = runtime.stats()
    assert stats.accelerator is not None
    assert stats.accelerator.hits
    assert stats.accelerator.misses == stats.accelerator.copies == stats.misses == stats.hits == stats.bytes_read == 0


def test_packed_experts_and_dense_layers(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """On two tiers; slots only; dense layers that stream, whose packed matrices move; all of them above."""
    directory = tiny_checkpoint("qwen3_moe")
    ids = prompt()
    options = {"ram": "1GiB", "context": 40, "quant": "int8"}
    plan = offload.plan(directory, **options)
    outputs, windows = [], []
    for vram in (None, "40KiB", plan.ram.dense_nbytes + 2 * plan.slot_nbytes, "1GiB"):
        above = {} if vram is None else {"device": "host", "vram": vram}
        model = offload.load(directory, nvme=store_root, **options, **above)
        with model.offload as runtime:
            outputs.append(greedy(model, ids))
            windows.append(runtime.plan.vram and runtime.plan.vram.window_layers)
    assert windows == [None, 0, 2, 0]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_policies_and_copies_ahead_change_no_bit(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    plan = offload.plan(directory, ram="1GiB", context=80)
    ram, slot = plan.peak_ram_nbytes - plan.ram.slot_nbytes, plan.slot_nbytes
    expected = greedy(reference_model(directory, torch.float32), prompt())
    user = LruPolicy()
    settings: list[tuple[int, int, str, dict[str, Any]]] = [
        (7, 5, "ForecastPolicy", {"policy": "auto", "prefetch": True}),
        (9, 4, "MrsPolicy", {"policy": "mrs", "prefetch": "auto"}),
        (6, 8, "LruPolicy", {"policy": user, "prefetch": True}),
        (7, 5, "LruPolicy", {"policy": "lru"}),
    ]
    seen, issued = [], 0
    for slots, above, name, options in settings:
        model = offload.load(
            directory, ram=ram + slots * slot, nvme=store_root, context=80, device="host", vram=above * slot,
            link="10GB/s", **options,
        )  # fmt: skip
        with model.offload as runtime:
            runtime.reset_stats()
            # Copies that take next to nothing and gain a little: what is copied does not hang on this machine's speed.
            runtime.accelerated.costs.of_layer = lambda _nbytes: CHEAP_COPIES
            assert torch.equal(greedy(model, prompt()), expected)
            assert torch.equal(greedy(model, prompt()), expected)
            seen.append(logits(model, prompt(seed=8)))
            runtime.check()
            stats = runtime.stats()
            upper = stats.accelerator
            assert upper.policy == stats.policy == name
            assert "prefetch" in options or not upper.copies_ahead_issued
            settled = upper.copies_ahead_used + upper.copies_ahead_late + upper.copies_ahead_wasted
            assert settled <= upper.copies_ahead_issued <= settled + above
            assert 0 <= upper.late_copy_stall_s <= upper.copy_stall_s
            if options.get("policy") is user:
                assert runtime.tier.policy is user
                assert runtime.accelerated.tiers.above.policy is not user
            issued += upper.copies_ahead_issued
    assert issued
    assert all(torch.equal(seen[0], other) for other in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, 'expected "host", "cuda" or "cuda:N"'),
        ({"device": "cuda:x"}, 'expected "host", "cuda" or "cuda:N"'),
        ({"device": "cuda", "link": "1GB/s"}, "a GPU's is measured"),
        ({"device": "cuda", "vram": "much"}, "vram="),
        ({"vram": "1GiB"}, "goes with device="),
        ({"link": "1GB/s"}, "goes with vram="),
        ({"device": "host", "vram": "1GiB", "link": "quick"}, "bytes per second"),
        ({"device": "host", "vram": "much"}, "vram="),
    ],
)
def test_arguments_that_do_not_go_together(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        offload.load(tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the error says is missing")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda_nothing_is_read(device: str, tmp_path: Path) -> None:
    """The directory has no checkpoint, of which nothing is said."""
    with pytest.raises(DeviceError, match=r"device='cuda.*(built without CUDA|no CUDA device)"):
        offload.load(tmp_path, device=device)


def test_an_accelerator_too_small_for_an_expert(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    with pytest.raises(DoesNotFitError, match="does not hold one expert"):
        offload.load(tiny_checkpoint("mixtral"), ram="1GiB", nvme=store_root, device="host", vram=1)


def test_of_an_accelerator_that_is_played_nothing_is_predicted_even_beside_a_gpu(
    tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    options = {"device": "host", "vram": "1MiB", "ram": "1GiB", "nvme": store_root, "context": 64}
    model = offload.load(tiny_checkpoint("qwen3_moe"), **options)
    amount = Amount(batch=1, prompt_tokens=8, new_tokens=4, prompts=1)
    told = predict_run(model.offload, amount, datasheet(gpu="rtx4090"), None)
    assert (told.workload.prompt_tokens, told.prediction) == (8, None)
    model.offload.close()
