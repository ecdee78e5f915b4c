"""Schedulers and predictors, by name and of one's own: the same bits, named in the statistics, nothing mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from offload import learnt
from offload.errors import InvalidArgumentError, PartError
from prefetch.policies.geometry import Geometry
from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.names import SOURCES
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.records import Home, LayerCosts
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.test_prefetching import small_budget


class CopyAll(StepScheduler):
    """Copies all that can be copied."""

    def __init__(self, *, as_they_come: bool) -> None:
        self.as_they_come, self.asked = as_they_come, 0

    def copies(self, loads: Sequence[int], homes: Sequence[Home], costs: LayerCosts) -> list[int]:
        self.asked += 1
        assert len(loads) == len(homes) and min(loads) > 0 and costs.has_gpu
        return [place for place, home in enumerate(homes) if home >= Home.RAM]


class SameAgain(LayerPredictor):
    """A token needs what the token before needed."""

    def __init__(self, geometry: Geometry, depth: int = 2) -> None:
        super().__init__(geometry, depth)
        self.last = [np.zeros(count) for count in geometry.counts]

    def predict_next(self, layer: int, logits: Sequence[Any], *_: Any) -> list[Any]:
        assert 1 <= len(logits) <= self.depth
        return self.last[layer + 1 : layer + 1 + len(logits)]

    def observe(self, layer: int, experts: Any, logits: Any = None) -> None:
        self.last[layer] = np.zeros(self.geometry.counts[layer])
        self.last[layer][experts] = 1.0

    def state(self) -> dict[str, Any]:
        return {f"last {layer}": table for layer, table in enumerate(self.last)}


def load(directory: Path, root: Path, slots: int = 7, **options: Any) -> Any:
    return offload.load(directory, ram=small_budget(directory, slots), nvme=root, context=80, **options)


@pytest.mark.parametrize("fused", [True, False], ids=["by tape", "by call"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_outputs_do_not_depend_on_the_scheduler(
    model_type: str, fused: bool, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    expected = greedy(reference_model(directory, torch.float32), prompt())
    own = CopyAll(as_they_come=False)
    seen = []
    for scheduler, name in (("auto", "auto"), ("off", "off"), (own, "CopyAll")):
        for prefetch in (False, True):
            model = load(directory, store_root, scheduler=scheduler, fused=fused, prefetch=prefetch)
            with model.offload as runtime:
                assert torch.equal(greedy(model, prompt()), expected)
                with torch.no_grad():
                    batch = model(input_ids=prompt(batch=3, tokens=1, seed=4)).logits.float()
                seen.append((logits(model, prompt(seed=8)), batch))
                stats = runtime.stats()
                assert stats.scheduler == name
                assert stats.misses > 0
                assert (stats.prefetches_issued > 0) == prefetch
                runtime.check()
    assert all(torch.equal(one, other) for pair in seen for one, other in zip(pair, seen[0], strict=True))
    assert not own.asked, "there is nothing to copy to"


@pytest.mark.parametrize("prefetch", [False, True])
def test_over_three_tiers_outputs_do_not_depend_on_the_scheduler(
    prefetch: bool, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    slot = offload.plan(directory, ram="1GiB", context=80).slot_nbytes
    expected = greedy(reference_model(directory, torch.float32), prompt())
    seen = []
    for scheduler in ("auto", "off", CopyAll(as_they_come=True), CopyAll(as_they_come=False)):
        model = load(
            directory, store_root, scheduler=scheduler, device="host", vram=5 * slot, link="10GB/s", prefetch=prefetch
        )
        with model.offload as runtime:
            runtime.reset_stats()
            assert torch.equal(greedy(model, prompt()), expected)
            seen.append(logits(model, prompt(seed=8)))
            stats = runtime.stats()
            above = stats.accelerator
            assert above.hits and above.misses and stats.misses
            if scheduler == "off":
                assert above.copies <= above.copies_ahead_issued, "copied for the step"
            elif isinstance(scheduler, CopyAll):
                assert scheduler.asked and above.copies
            runtime.check()
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_predictors_change_no_bit_and_are_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    expected = greedy(reference_model(directory, torch.float32), prompt())
    with load(directory, tmp_path).offload as runtime:
        geometry = runtime.geometry
        assert runtime.stats().predictor is None
    seen = []
    for predictor in ("auto", *SOURCES, SameAgain(geometry)):
        for policy in ("auto", "lru"):
            model = load(directory, tmp_path, slots=9, predictor=predictor, prefetch=True, policy=policy)
            with model.offload as runtime:
                assert torch.equal(greedy(model, prompt()), expected)
                assert torch.equal(greedy(model, prompt()), expected)
                seen.append(logits(model, prompt(seed=8)))
                stats = runtime.stats()
                assert stats.predictor == (predictor if isinstance(predictor, str) else "SameAgain")
                assert stats.as_dict()["predictor"] == stats.predictor
                compiled = runtime.observer.prefetcher._foresight is not None
                assert compiled == (policy == "auto" and isinstance(predictor, str))
                if predictor in ("auto", "router") or isinstance(predictor, SameAgain):
                    assert stats.prefetches_issued
                for skill in stats.skills:
                    heard = {"router": skill.router, "transition": skill.transition, "previous": skill.previous}
                    assert predictor == "auto" or not any(heard[name] for name in heard if name != predictor)
                runtime.check()
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_what_one_source_learnt_is_not_anothers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    kept: dict[Any, dict[str, Any]] = {}
    with load(directory, tmp_path).offload as runtime:
        geometry, path = runtime.geometry, learnt.learnt_path(runtime.store)
    for predictor in ("auto", "router", SameAgain(geometry)):
        model = load(directory, tmp_path, predictor=predictor, prefetch=True)
        fresh = model.offload.observer.prefetcher.predictor
        assert not any(table.any() for name, table in fresh.state().items() if name.startswith(("offset", "last")))
        greedy(model, prompt())
        kept[predictor] = {name: table.astype(np.float32) for name, table in fresh.state().items()}
        model.offload.close()
    with np.load(path) as tables:
        assert {name.partition("/")[0] for name in tables.files} == {
            "version", "identity", "policy", "predictor", "predictor router", "predictor SameAgain",
        }  # fmt: skip
    for predictor in ("router", "auto", SameAgain(geometry)):
        name = predictor if isinstance(predictor, str) else next(one for one in kept if not isinstance(one, str))
        restored = []
        if isinstance(predictor, SameAgain):
            predictor.restore = restored.append  # type: ignore[method-assign, assignment]
        with load(directory, tmp_path, predictor=predictor, prefetch=True).offload as runtime:
            found = restored[0] if restored else runtime.observer.prefetcher.predictor.state()
            assert found.keys() == kept[name].keys()
            assert all(np.array_equal(found[key].astype(np.float32), kept[name][key]) for key in found)


def test_a_predictor_of_other_layers_is_refused_before_anything_is_read(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    predictor = SameAgain(Geometry((8, 7)))
    with pytest.raises(InvalidArgumentError, match=r"layers of \(8, 7\) experts, but .* layers of \(8, 8, 8\)"):
        load(tiny_checkpoint("qwen3_moe"), tmp_path, predictor=predictor, prefetch=True)
    assert not list(tmp_path.iterdir())


def test_a_predictor_that_says_what_cannot_be_ends_the_step_and_nothing_else(
    tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    predictor = SameAgain(Geometry((8, 8, 8)))
    model = load(directory, store_root, predictor=predictor, prefetch=True)
    with model.offload as runtime:
        expected = greedy(model, prompt())
        right = predictor.predict_next
        predictor.predict_next = lambda *_: [np.full(8, np.nan)] * 2  # type: ignore[method-assign]
        with pytest.raises(PartError, match=r"SameAgain.predict_next gave numbers from nan"):
            greedy(model, prompt())
        runtime.check()
        predictor.predict_next = right  # type: ignore[method-assign]
        assert torch.equal(greedy(model, prompt()), expected)


def test_a_scheduler_that_says_what_cannot_be_ends_the_step_and_nothing_else(
    tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    slot = offload.plan(directory, ram="1GiB", context=80).slot_nbytes
    scheduler = CopyAll(as_they_come=True)
    model = load(directory, store_root, scheduler=scheduler, device="host", vram=4 * slot)
    with model.offload as runtime:
        expected = greedy(model, prompt())
        right = scheduler.copies
        scheduler.copies = lambda loads, _homes, _costs: [len(loads)]  # type: ignore[method-assign]
        with pytest.raises(PartError, match=r"CopyAll.copies gave \d+, expected places from 0"):
            greedy(model, prompt())
        runtime.check()
        scheduler.copies = right  # type: ignore[method-assign]
        assert torch.equal(greedy(model, prompt()), expected)
