"""A rig with an accelerator above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xxhash

from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import Link, LinkReader
from offload.moe.costs import ObservedCosts
from offload.moe.step import StepWatch
from offload.moe.tiered_step import Accelerated, tiered_step
from offload.tiers.accelerated import TierPair
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import ReadEngine, ReadRequest
from prefetch.policies.base import CachePolicy
from prefetch.policies.lru import LruPolicy
from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.records import LayerCosts
from tests.devices.test_link import FakeClock
from tests.moe.rig import Rig

# Costs with which the scheduler copies everything, nothing, and a part.
COPY_ALL = LayerCosts(cpu_token_s=1.0, cpu_expert_s=100.0, gpu_expert_s=1e-3, link_expert_s=1e-3)
COPY_NONE = LayerCosts(cpu_token_s=1e-6, gpu_expert_s=1.0, link_expert_s=100.0)
COPY_SOME = LayerCosts(cpu_token_s=1.0, gpu_expert_s=0.1, link_expert_s=1.0, disk_expert_s=0.5)


class InTurn(EarliestCompletion):
    """Copies what makes the layer end earliest, and goes through the others in ascending order."""

    as_they_come = False


class FixedCosts(ObservedCosts):
    def __init__(self, costs: LayerCosts) -> None:
        super().__init__(Link(1e9), 1e9)
        self.costs = costs

    def of_layer(self, bundle_nbytes: int) -> LayerCosts:
        return self.costs


class TieredRig(Rig):
    """A rig with an accelerator above; copies take no time."""

    def __init__(
        self,
        *,
        above: int,
        costs: LayerCosts,
        engine: Callable[..., Any] = ReadEngine,
        policy: Callable[[], CachePolicy] = LruPolicy,
        **options: Any,
    ) -> None:
        super().__init__(engine=engine, policy=policy, **options)
        self.accelerator = HostAccelerator(above * self.layout.nbytes, Link(1e9))
        self.link = LinkReader(Link(1e9), FakeClock())
        self.copies = engine(self.link, threads=1, chunk_nbytes=4096)
        arena = Arena(self.accelerator, self.layout.nbytes, above)
        for slot in range(above):
            arena.view(slot, self.layout.nbytes)[:] = 0xFF
        upper = ExpertTier(arena, policy(), self.copies, self._locate_below, lambda _key: self.layout.nbytes)
        self.pair = TierPair(upper, self.tier)
        self.accelerated = Accelerated(self.pair, self.device, self.accelerator, FixedCosts(costs))

    def _locate_below(self, key: int, out: memoryview) -> ReadRequest:
        start = key * self.layout.nbytes
        checksum = xxhash.xxh3_64_intdigest(self.reader.shard[start : start + self.layout.nbytes])
        return ReadRequest(0, self.tier.address(key), out, checksum, f"the copy of expert {key}")

    def tiered(self, layer: int, *inputs: torch.Tensor, watch: StepWatch | None = None) -> torch.Tensor:
        with torch.no_grad():
            return tiered_step(self.layers[layer], self.accelerated, *inputs, watch)

    def assert_idle(self) -> None:
        super().assert_idle()
        self.pair.check()
        assert not self.pair.above.table.pinned
        assert not self.copies._queue.unfinished

    def close(self) -> None:
        self.copies.close()
        super().close()
