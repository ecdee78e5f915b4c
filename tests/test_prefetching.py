"""Whatever the policy and whatever is read ahead: the same bits, and statistics that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from offload import assembly
from offload.errors import InvalidArgumentError, SlowReadWarning, UnsupportedOperationError
from offload.hf.lookahead import find_routers
from offload.request import FUSED_KINDS, make_request
from prefetch.policies.lru import LruPolicy
from prefetch.policies.names import POLICIES
from prefetch.traces.codec import decode, encode
from prefetch.traces.replay import replay
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.tiny_models import ARCHITECTURES

OPTIONS: list[dict[str, Any]] = [
    {"policy": "lru", "prefetch": False},
    {"policy": "auto", "prefetch": "auto"},
    {"policy": "auto", "prefetch": True},
    {"policy": "lru", "prefetch": True},
    {"policy": "arc", "prefetch": "on"},
]


def small_budget(directory: Path, slots: int) -> int:
    plan = offload.plan(directory, ram="1GiB", context=80)
    return plan.peak_ram_nbytes - plan.ram.slot_nbytes + slots * plan.slot_nbytes


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_output_does_not_depend_on_policy_and_prefetching(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    expected = greedy(reference_model(directory, torch.float32), prompt())
    ram, seen = small_budget(directory, 7), []
    for options in OPTIONS:
        model = offload.load(directory, ram=ram, nvme=store_root, context=80, **options)
        with model.offload as runtime:
            assert runtime.plan.ram_slots == 7
            assert torch.equal(greedy(model, prompt()), expected)
            assert torch.equal(greedy(model, prompt()), expected)
            seen.append(logits(model, prompt(seed=8)))
            stats = runtime.stats()
            settled = stats.prefetches_used + stats.prefetches_late + stats.prefetches_wasted
            assert settled <= stats.prefetches_issued <= settled + 7
            assert 0 <= stats.late_stall_s <= stats.read_stall_s
            assert (stats.prefetches_issued > 0) == (options["prefetch"] is not False)
            runtime.check()
    assert all(torch.equal(seen[0], other) for other in seen), "logits depend on policy or prefetching"


def test_two_threads_may_generate_while_experts_are_read_ahead(
    tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    import threading

    directory = tiny_checkpoint("qwen3_moe")
    model = offload.load(directory, ram=small_budget(directory, 9), nvme=store_root, context=80, prefetch=True)
    expected = [greedy(model, prompt(seed=seed)) for seed in (1, 2)]
    found: dict[int, torch.Tensor] = {}

    def run(place: int) -> None:
        found[place] = greedy(model, prompt(seed=place + 1))

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[place], expected[place]) for place in (0, 1))
    model.offload.check()
    model.offload.close()


def test_a_run_records_the_routing_that_it_had(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    slots = 7
    model = offload.load(
        directory, ram=small_budget(directory, slots), nvme=store_root, context=80, policy="lru", prefetch=False
    )
    runtime: Any = model.offload
    with pytest.raises(UnsupportedOperationError, match="record_trace"):
        runtime.trace()
    runtime.record_trace("tiny, random tokens")
    ids = prompt(tokens=11)
    out = greedy(model, ids)
    trace = decode(encode(runtime.trace()))
    assert trace.name == "tiny, random tokens"
    assert trace.pass_tokens.tolist() == [11] + [1] * (out.shape[1] - 12)
    assert trace.pass_prefill.tolist() == [True] + [False] * (trace.passes - 1)
    recorded: list[torch.Tensor] = []
    routers = find_routers(model, runtime.layers)
    assert routers is not None
    for router in routers:
        router.register_forward_hook(lambda _module, _args, output: recorded.append(output[2]))
    model(input_ids=ids)
    for layer, chosen in enumerate(recorded):
        assert np.array_equal(np.sort(trace.experts[:11, layer]), np.sort(chosen.numpy()))
    # The tier did in the run what replay says of its trace.
    stats = runtime.stats()
    assert stats.policy == "LruPolicy"
    again = replay(trace, LruPolicy(), slots)
    model.offload.close()
    fresh = offload.load(
        directory, ram=small_budget(directory, slots), nvme=store_root, context=80, policy=LruPolicy(), prefetch=False
    )
    greedy(fresh, ids)
    measured = fresh.offload.stats()
    assert measured.hits + measured.misses == again.prefill_hits + again.decode_hits + again.misses
    assert measured.misses == pytest.approx(again.misses, rel=0.1)
    fresh.offload.close()


@pytest.mark.parametrize("fused", [FUSED_KINDS, ()], ids=["by tape", "by its own code"])
def test_every_layer_of_a_token_teaches_once(
    fused: tuple[str, ...], tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """Whether the step had to wait, while which it learns, or not."""
    directory = tiny_checkpoint("qwen3_moe", torch.bfloat16)
    ram = small_budget(directory, 9)
    model = offload.load(directory, ram=ram, nvme=store_root, context=80, prefetch=True, fused=list(fused))
    with model.offload as runtime:
        runtime.record_trace()
        taught: list[tuple[int, list[int]]] = []
        prefetcher = runtime.observer.prefetcher
        assert prefetcher is not None
        original = prefetcher.observe

        def observe(layer: int, experts: Any) -> None:
            taught.append((layer, sorted(experts.tolist())))
            original(layer, experts)

        prefetcher.observe = observe  # type: ignore[method-assign]
        greedy(model, prompt(tokens=11))
        routed = np.sort(runtime.trace().experts[11:], axis=-1).tolist()
        assert 0 < runtime.stats().misses < runtime.stats().hits + runtime.stats().misses
    assert taught == [(layer, experts) for token in routed for layer, experts in enumerate(token)]


# Hunyuan's router has its weights in a module of its own.
@pytest.mark.parametrize("model_type", [one for one in ARCHITECTURES if one != "hunyuan_v1_moe"])
def test_routers_are_found_where_transformers_records_none(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload.load(tiny_checkpoint(model_type), ram="1GiB", nvme=store_root, context=80)
    with model.offload as runtime:
        recorded = find_routers(model, runtime.layers)
        monkeypatch.setattr(type(model), "_can_record_outputs", {})
        assert recorded is not None and find_routers(model, runtime.layers) == recorded


def test_routers_that_are_not_found_are_told_of(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint("mixtral")
    monkeypatch.setattr(assembly, "find_routers", lambda *_: None)
    with pytest.warns(SlowReadWarning, match="experts are not read ahead"):
        model = offload.load(directory, ram=small_budget(directory, 5), nvme=store_root, context=80, prefetch=True)
    model.offload.close()


def test_arguments_are_checked_at_the_door() -> None:
    def make(**changed: Any) -> Any:
        return make_request(ram="1GiB", nvme="/x", context=None, batch=1, prefill_chunk=8, max_memory=None, **changed)

    for name in ("auto", *POLICIES):
        assert make(policy=name).policy == name
    assert [make(prefetch=value).prefetch for value in (True, False, "auto", "on")] == ["on", "off", "auto", "on"]
    for bad in ("fifo", None, 3, ["lru"], LruPolicy):
        with pytest.raises(InvalidArgumentError, match=r"policy=.*expected auto, forecast, lru"):
            make(policy=bad)
    for bad in ("yes", None, 1, 0, ["on"]):
        with pytest.raises(InvalidArgumentError, match=r"prefetch=.*expected True, False, auto"):
            make(prefetch=bad)
