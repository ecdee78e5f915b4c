"""The scores that policies are told of are those of transformers' own routers, by tape and by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from offload import assembly
from offload.errors import SlowReadWarning
from offload.hf.lookahead import find_routers
from offload.hf.router_scores import hear_routers
from offload.scores import RouterScores
from prefetch.policies.geometry import Geometry
from prefetch.policies.mrs import MrsPolicy
from prefetch.policies.quotas import QuotaPolicy
from prefetch.traces.replay import keys_of
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt, reference_model
from tests.test_prefetching import small_budget


def reference_scores(directory: Path, geometry: Geometry, ids: torch.Tensor, layers: Any) -> tuple[list[Any], Any]:
    """By pass and layer, mean probabilities of transformers' routers while it decodes; and its tokens."""
    model = reference_model(directory, torch.float32)
    routers = find_routers(model, layers)
    assert routers is not None
    said: list[np.ndarray] = []
    for router, count in zip(routers, geometry.counts, strict=True):

        def note(_module: Any, _args: Any, output: Any, count: int = count) -> None:
            logits = output[0].reshape(-1, count).double()
            said.append((logits.exp() / logits.exp().sum(-1, keepdim=True)).mean(0).numpy())

        router.register_forward_hook(note)
    tokens = greedy(model, ids)
    return [said[first : first + geometry.layers] for first in range(0, len(said), geometry.layers)], tokens


@pytest.mark.parametrize("fused", [True, False], ids=["by tape", "by call"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_policy_has_the_scores_of_a_replay(
    model_type: str, fused: bool, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory, ids = tiny_checkpoint(model_type), prompt(tokens=11)
    model = offload.load(
        directory, ram=small_budget(directory, 7), nvme=store_root, context=80, policy="mrs", fused=fused
    )
    with model.offload as runtime:
        runtime.record_trace()
        found = greedy(model, ids)
        trace, geometry = runtime.trace(), runtime.geometry
        policy = runtime.tier.policy
        assert isinstance(policy, MrsPolicy)
        layers = runtime.layers
        assert runtime.stats().misses
    by_pass, expected = reference_scores(directory, geometry, ids, layers)
    assert torch.equal(found, expected)
    assert len(by_pass) == trace.passes
    replayed = MrsPolicy(geometry)
    for place, step in enumerate(trace.steps()):
        replayed.on_route(keys_of(trace, step), step.shares)
        first = int(geometry.first_keys[step.layer])
        replayed.on_scores(first, by_pass[place // geometry.layers][step.layer])
    assert policy.scores.any()
    assert np.allclose(policy.scores, replayed.scores, rtol=1e-4, atol=1e-6)


def test_both_tiers_are_told(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    slot = offload.plan(directory, ram="1GiB", context=80).slot_nbytes
    model = offload.load(
        directory, ram=small_budget(directory, 7), nvme=store_root, context=80, device="host", vram=4 * slot,
        policy="mrs", scheduler="off",
    )  # fmt: skip
    with model.offload as runtime:
        greedy(model, prompt())
        above, below = (tier.policy for tier in runtime.tiers())
        assert isinstance(above, MrsPolicy) and isinstance(below, MrsPolicy)
        assert above is not below and above._scored and below._scored


@pytest.mark.parametrize(("policy", "slots"), [("lru", 7), ("mrs", 10_000)], ids=["not wanted", "all in RAM"])
def test_nobody_listens_where_nothing_comes_of_it(
    policy: str, slots: int, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    ram = small_budget(directory, slots)
    model = offload.load(directory, ram=ram, nvme=store_root, context=80, policy=policy)
    with model.offload as runtime:
        assert runtime.observer.scores is None
        routers = find_routers(model, runtime.layers)
        assert routers is not None and not any(router._forward_hooks for router in routers)


def test_routers_that_are_not_found_are_told_of(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint("mixtral")
    monkeypatch.setattr(assembly, "find_routers", lambda *_: None)
    with pytest.warns(SlowReadWarning, match=r"MrsPolicy goes by uses.*not of a form"):
        model = offload.load(directory, ram=small_budget(directory, 5), nvme=store_root, context=80, policy="mrs")
    with model.offload as runtime:
        greedy(model, prompt())
        assert runtime.tier.policy.scores.any()


def test_a_graph_calls_no_router(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("mixtral")
    slot = offload.plan(directory, ram="1GiB", context=80).slot_nbytes
    with pytest.warns(SlowReadWarning, match=r"goes by uses.*step_graph=True calls none"):
        model = offload.load(
            directory, ram="1GiB", nvme=store_root, context=80, device="host", vram=4 * slot, policy="mrs",
            step_graph=True,
        )  # fmt: skip
    model.offload.close()


def test_a_router_of_another_form_is_told_of_once(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    model = offload.load(tiny_checkpoint("mixtral"), ram="1GiB", nvme=store_root, context=80)
    with model.offload as runtime:
        count = runtime.layers[0].count
        policy = MrsPolicy(runtime.geometry)
        scores = RouterScores([policy], [0])

        class Other(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return x[..., :1], x

        router = Other()
        hear_routers([router], runtime.layers[:1], scores)
        with pytest.warns(SlowReadWarning, match=f"Other of MoE layer 0 returns no logits of {count} experts"):
            router(torch.zeros(2, count))
        router(torch.zeros(2, count))
        scores.tell(0)
        assert not policy._scored


def test_quotas_want_what_the_policy_within_wants() -> None:
    geometry = Geometry((4, 4))
    assert QuotaPolicy(MrsPolicy(geometry), geometry).wants_scores
