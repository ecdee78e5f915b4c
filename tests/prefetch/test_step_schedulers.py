"""Schedulers of steps: by name, and what each says."""

from __future__ import annotations

import pytest

from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.named import UnknownSchedulerError, make_scheduler, name_of
from prefetch.scheduler.names import SCHEDULERS
from prefetch.scheduler.records import Home, LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler
from prefetch.scheduler.static import StaticOrder

COSTS = LayerCosts(cpu_token_s=1.0, gpu_expert_s=0.1, link_expert_s=1.0, disk_expert_s=0.5)


def test_names() -> None:
    for name in SCHEDULERS:
        assert name_of(make_scheduler(name)) == name
    with pytest.raises(UnknownSchedulerError, match="expected auto or off"):
        make_scheduler("best")

    class Own(EarliestCompletion):
        pass

    assert name_of(Own()) == "Own"


def test_what_is_copied() -> None:
    loads, homes = [4, 1, 3, 2, 6], [Home.VRAM, Home.RAM, Home.RAM, Home.DISK, Home.DISK]
    best = EarliestCompletion()
    assert best.as_they_come
    found = best.copies(loads, homes, COSTS)
    assert found and found == LayerScheduler(COSTS).schedule(loads, homes).transfers.tolist()
    static = StaticOrder()
    assert not static.as_they_come
    assert not static.copies(loads, homes, COSTS)
