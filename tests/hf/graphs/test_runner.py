"""Decode steps that are replayed, over host memory that plays the accelerator: the tokens are those of transformers."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import offload
from offload.errors import ClosedError, InvalidArgumentError, SlowDeviceWarning, StorageError
from offload.hf.graphs import runner
from offload.step_graph.recorded_graph import RecordedGraph
from prefetch.traces.trace import RoutingTrace
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.tiny_models import ARCHITECTURES

FAMILY = "qwen3_moe"
BATCH = 2


def _load(directory: Path, root: Path, *, above: int = 6, below: int | None = 6, **options: Any) -> PreTrainedModel:
    """With all dense weights above, and so many experts' slots there and below; None for all of them."""
    given = {"context": 64, "batch": BATCH}
    plan = offload.plan(directory, ram="1GiB", **given)
    slot, dense = plan.slot_nbytes, plan.ram.dense_nbytes
    ram = "1GiB" if below is None else plan.minimum_ram_nbytes + below * slot
    return offload.load(
        directory, ram=ram, nvme=root, device="host", vram=dense + above * slot + (64 << 10), link="10GB/s",
        step_graph=True, **given, **options,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_family_is_captured(model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Experts above, below and on disk, which move between steps; a second request begins in the same buffers."""
    directory = tiny_checkpoint(model_type)
    ids = prompt(batch=BATCH)
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root)
    with model.offload as runtime:
        for _ in range(2):
            assert torch.equal(greedy(model, ids), expected)
        runtime.check()
        stats = runtime.stats()
    assert stats.graphs.reason == ""
    assert (stats.graphs.captured, stats.graphs.layer_by_layer, stats.graphs.replayed) == (1, 1, 29), stats.graphs
    assert stats.accelerator.hits
    assert stats.accelerator.copies > stats.accelerator.slots, "experts move between steps"
    assert stats.accelerator.misses == stats.hits + stats.misses


@pytest.mark.parametrize(("model_type", "options"), [("gpt_oss", {}), (FAMILY, {"attn_implementation": "eager"})])
def test_keys_are_not_repeated_for_query_heads(
    model_type: str, options: dict[str, Any], tiny_checkpoint: TinyCheckpoint, store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In a step; layer by layer they are, as transformers' functions have it."""
    directory = tiny_checkpoint(model_type)
    ids = prompt()
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root, below=None, **options)
    modelling: Any = inspect.getmodule(type(model))
    repeat, repeated = modelling.repeat_kv, {True: 0, False: 0}

    def counted(states: torch.Tensor, times: int) -> torch.Tensor:
        repeated[runtime.queue is not None and states.shape[2] > 7] += 1
        return repeat(states, times)

    monkeypatch.setattr(modelling, "repeat_kv", counted)
    with model.offload as runtime:
        assert torch.equal(greedy(model, ids), expected)
        assert runtime.stats().graphs.replayed == 14
    assert repeated[False]
    assert not repeated[True]


def test_buffers_double(tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST_ROOM_TOKENS", 16)
    directory = tiny_checkpoint(FAMILY)
    ids = prompt()
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=60)
    model = _load(directory, store_root, below=None)
    with model.offload as runtime:
        assert torch.equal(greedy(model, ids, new_tokens=60), expected)
        # 32 and 64 tokens, and 128, though the plan ends at 64.
        assert runtime.stats().graphs.captured == 3


def test_ways_of_generating(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Left padding, beams and prompt lookup, which rearrange the cache between steps, and long chunks."""
    directory = tiny_checkpoint(FAMILY)
    reference = reference_model(directory, torch.float32)
    padded = prompt(batch=BATCH)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    repeated = prompt(tokens=6).repeat(1, 3)
    cases: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (padded, {"attention_mask": mask}),
        (prompt(), {"num_beams": 2}),
        (repeated, {"prompt_lookup_num_tokens": 3}),
        (prompt(tokens=1), {}),
    ]
    model = _load(directory, store_root)
    with model.offload as runtime:
        with pytest.warns(SlowDeviceWarning, match="a cache was rearranged between steps"):
            for ids, options in cases:
                assert torch.equal(greedy(model, ids, **options), greedy(reference, ids, **options)), options
        assert runtime.stats().graphs.reason == ""
        assert "a cache was rearranged between steps" in runtime.stats().graphs.by_reason
        assert runtime.stats().graphs.replayed > 20


def test_caches_by_hand(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Keys that somebody looks at stay what they are, copies go their own way, and cropped caches go on."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt(tokens=12)
    reference = reference_model(directory, torch.float32)
    expected = logits(reference, ids)
    model = _load(directory, store_root)

    def step(cache: DynamicCache, place: int) -> None:
        with torch.no_grad():
            found = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits.float()
        torch.testing.assert_close(found[0, 0], expected[0, place], rtol=0, atol=1e-4)

    with model.offload as runtime:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :4], past_key_values=cache, use_cache=True)
        for place in range(4, 8):
            step(cache, place)
        assert runtime.stats().graphs.replayed == 3
        twin = copy.deepcopy(cache)
        cache.crop(-2)
        for place in range(6, 10):
            step(cache, place)
        for place in range(8, 10):
            step(twin, place)
        assert runtime.stats().graphs.captured == 2, "one holds one cache"
        held = cache.layers[0].keys
        before = held.clone()
        del cache, twin
        gc.collect()
        greedy(model, prompt(seed=5))
        assert torch.equal(held, before)


def test_what_graphs_do_not_know_goes_layer_by_layer(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Hooks, other outputs and gradients' mode; and graphs go on when the hook is gone."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt()
    model = _load(directory, store_root)
    with model.offload as runtime:
        expected = greedy(model, ids)
        calls: list[int] = []
        handle = model.get_decoder().layers[1].register_forward_hook(lambda *_: calls.append(1))
        before = runtime.stats().graphs
        with pytest.warns(SlowDeviceWarning, match="a hook"):
            assert torch.equal(greedy(model, ids), expected)
        assert len(calls) == 16
        assert runtime.stats().graphs.replayed == before.replayed
        assert runtime.stats().graphs.by_reason == before.by_reason | {
            "a hook, an adapter or other weights are in the decoder": 15
        }
        handle.remove()
        assert torch.equal(greedy(model, ids), expected)
        assert runtime.stats().graphs.replayed > before.replayed
        with pytest.warns(SlowDeviceWarning, match="more is asked for"):
            out = model.generate(
                ids, max_new_tokens=4, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
            )
        assert sum(runtime.stats().graphs.by_reason.values()) == runtime.stats().graphs.layer_by_layer
        assert torch.equal(out.sequences, expected[:, : ids.shape[1] + 4])
        assert len(out.hidden_states) == 4


def test_more_caches_than_graphs(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Those that came too late go layer by layer, which is counted and told once, until another is gone."""
    reason = "more than 4 caches are in use at once"
    directory = tiny_checkpoint(FAMILY)
    ids = prompt(tokens=8)
    expected = logits(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root)

    def step(cache: DynamicCache, first: int, last: int) -> None:
        found = model(ids[:, first:last], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(found.float(), expected[:, last - 1], rtol=0, atol=1e-4)

    with model.offload as runtime, torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(5)]
        for cache in caches:
            step(cache, 0, 4)
        for cache in caches[:4]:
            step(cache, 4, 5)
        for place in (4, 5):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                step(caches[4], place, place + 1)
            assert [str(one.message).endswith(reason) for one in told] == [True] * (place == 4)
        assert runtime.stats().graphs.by_reason == {"a graph is proven": 4, reason: 2}
        for cache in caches[1:4]:
            step(cache, 5, 6)
        assert runtime.stats().graphs.replayed == 3
        del caches[0], cache
        gc.collect()
        step(caches[-1], 6, 7)
        step(caches[-1], 7, 8)
        stats = runtime.stats()
        assert (stats.graphs.captured, stats.graphs.by_reason[reason]) == (4, 2)
        assert stats.graphs.replayed == 5


def test_what_changes_between_steps_is_seen_beside_the_next(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """A step that began before it was known is as if it had not been: of its tokens, and of what is counted."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt(tokens=14)
    reference, model = reference_model(directory, torch.float32), _load(directory, store_root)
    caches = [DynamicCache(config=one.config) for one in (reference, model)]

    def step(first: int, last: int) -> None:
        expected, found = (
            one(ids[:, first:last], past_key_values=cache, use_cache=True).logits
            for one, cache in zip((reference, model), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def scale(one: PreTrainedModel, factor: float) -> None:
        weight = one.get_decoder().layers[1].self_attn.o_proj.weight
        kept.append(weight.data)
        weight.data = factor * weight.data

    kept: list[torch.Tensor] = []
    with model.offload as runtime, torch.no_grad():
        step(0, 4)
        for place in (4, 5, 6):
            step(place, place + 1)
        assert runtime.stats().graphs.replayed == 2
        calls: list[int] = []
        handle = model.get_decoder().layers[1].register_forward_hook(lambda *_: calls.append(1))
        with pytest.warns(SlowDeviceWarning, match="a hook"):
            step(7, 8)
        step(8, 9)
        assert len(calls) == 2
        handle.remove()
        for place in (9, 10):
            step(place, place + 1)
        assert runtime.stats().graphs.replayed == 4
        for one in (reference, model):
            scale(one, 2.0)
        for place in (11, 12, 13):
            step(place, place + 1)
        stats = runtime.stats()
        assert stats.graphs.replayed == 4
        assert stats.graphs.by_reason["a hook, an adapter or other weights are in the decoder"] == 5
        assert stats.accelerator.misses == stats.hits + stats.misses
        runtime.check()


def test_a_read_that_fails(tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends with the error, nothing is left in use, and the next one works."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt()
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=40)
    model = _load(directory, store_root, above=2, below=4)
    with model.offload as runtime:
        greedy(model, ids)
        tier, left = runtime.tier, [3]
        fetch = tier.fetch

        def failing(keys: Any, arrived: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise StorageError("no such sector")
            fetch(keys, arrived)

        monkeypatch.setattr(tier, "fetch", failing)
        with pytest.raises(StorageError, match="no such sector"):
            greedy(model, ids, new_tokens=40)
        runtime.check()
        assert torch.equal(greedy(model, ids, new_tokens=40), expected)
        runtime.check()


def test_threads_share_a_model(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint(FAMILY)
    prompts = [prompt(seed=seed) for seed in range(3)]
    reference = reference_model(directory, torch.float32)
    expected = [greedy(reference, ids) for ids in prompts]
    model = _load(directory, store_root)
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = greedy(model, prompts[number])

    with model.offload as runtime:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        runtime.check()
    assert all(torch.equal(found[number], expected[number]) for number in range(3))


def test_a_capture_that_lies_is_found_out(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that does not write the token's keys: the layers' own outputs are what is returned, and it is said."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt()
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root)
    capture = RecordedGraph.capture

    def writes_keys(operation: Any) -> bool:
        known = inspect.getclosurevars(operation).nonlocals if inspect.isfunction(operation) else {}
        return known.get("func") is torch.ops.aten.index_copy_.default

    def forget_a_token(self: RecordedGraph, step: Any) -> None:
        capture(self, step)
        self._operations.remove(next(operation for operation in self._operations if writes_keys(operation)))

    monkeypatch.setattr(RecordedGraph, "capture", forget_a_token)
    with model.offload as runtime, pytest.warns(SlowDeviceWarning, match="does not give what the layers give"):
        assert torch.equal(greedy(model, ids), expected)
        assert runtime.stats().graphs.replayed == runtime.stats().graphs.captured == 0


def test_no_memory_for_a_captured_step(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a request and its answer: the step goes layer by layer, as all do from then on."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt()
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with model.offload as runtime:
        monkeypatch.setattr(runtime.accelerated.accelerator, "sum_experts", full)
        with pytest.warns(SlowDeviceWarning, match="layer by layer: no memory for a captured step"):
            assert torch.equal(greedy(model, ids), expected)
        assert torch.equal(greedy(model, ids), expected)
        runtime.check()
        assert (runtime.stats().graphs.replayed, runtime.stats().graphs.captured) == (0, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quant": "int8"}, "packed dense layers on the CPU"),
        ({"kv": "int8"}, "its KV cache lies in blocks"),
        ({"kv_vram": "64KiB"}, "its KV cache lies in blocks"),
        ({"attn_implementation": "plain"}, "attention is plain"),
    ],
)
def test_why_not(options: dict[str, Any], reason: str, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    AttentionInterface.register("plain", ALL_ATTENTION_FUNCTIONS["sdpa"])
    with pytest.warns(SlowDeviceWarning, match=f"go layer by layer: {reason}"):
        model = _load(tiny_checkpoint(FAMILY), store_root, below=None, **options)
    with model.offload as runtime:
        assert reason in runtime.stats().graphs.reason


def test_too_few_slots_for_a_request(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts of a request have to be in host memory at once; where they cannot, layers fetch one by one."""
    directory = tiny_checkpoint(FAMILY)
    ids = prompt(batch=BATCH)
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = _load(directory, store_root)
    with model.offload as runtime:
        monkeypatch.setattr(runtime._room, "_slots_beside", lambda _nbytes: 5)
        with pytest.warns(SlowDeviceWarning, match="no slot for each expert of a step"):
            assert torch.equal(greedy(model, ids), expected)
        assert runtime.tier.table.usable_slots == 5
        assert runtime.stats().graphs.replayed == 0


def test_after_close(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    model = _load(tiny_checkpoint(FAMILY), store_root)
    greedy(model, prompt())
    model.offload.close()
    model.offload.close()
    with pytest.raises(ClosedError):
        greedy(model, prompt())
    assert not [thread for thread in threading.enumerate() if thread.name == "offload-doorbell"]


def test_policies_are_told_of_every_step(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, once, the last one before anything else happens; whether a step was replayed or not."""
    model = _load(tiny_checkpoint(FAMILY), store_root)
    with model.offload as runtime:
        policy, told = runtime.accelerated.tiers.above.policy, []
        on_route = policy.on_route

        def listen(keys: Any, shares: Any = None) -> None:
            told.append([int(key) for key in keys])
            on_route(keys, shares)

        monkeypatch.setattr(policy, "on_route", listen)
        for _ in range(2):
            runtime.record_trace()
            told.clear()
            greedy(model, prompt())
            assert runtime.graphs.figures.replayed
            routed = [[layer.first_key + expert for expert in step.experts.tolist()]
                      for step in runtime.trace().steps() for layer in (runtime.layers[step.layer],)]  # fmt: skip
            assert told == routed[: -len(runtime.layers)]
            for _ in range(2):
                stats = runtime.stats()
                assert told == routed
                assert stats.accelerator.hits + stats.accelerator.misses >= sum(map(len, routed))


@pytest.mark.filterwarnings("ignore:.*not wanted here:offload.errors.SlowDeviceWarning")
def test_a_trace_has_every_step(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint(FAMILY)
    traces = []
    for graph in (True, False):
        model = _load(directory, store_root, below=None)
        with model.offload as runtime:
            if not graph:
                runtime.graphs.figures.reason = "not wanted here"
            runtime.record_trace()
            greedy(model, prompt())
            traces.append(runtime.trace())
            assert bool(runtime.stats().graphs.replayed) == graph
    first, second = traces
    for field in fields(RoutingTrace):
        np.testing.assert_equal(getattr(first, field.name), getattr(second, field.name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_graph": True}, "goes with device="),
        ({"step_graph": "yes", "device": "host", "vram": "1GiB"}, "expected True or False"),
        ({"step_graph": True, "device": "host", "vram": "1GiB", "prefetch": True}, "no moment between layers"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        offload.load(tmp_path, **options)
