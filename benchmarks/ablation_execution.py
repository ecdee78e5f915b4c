"""The same ablation, executed: the runtime's tiers, step, scheduler, copies ahead and modelled link, in real time.

Small experts are computed for real; then the device waits until the moment at which the modelled one would be done. The
accelerator's time runs beside the CPU's, as a GPU's does, so that what overlaps is found by running it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xxhash

from benchmarks.ablation_machine import Model
from benchmarks.ablation_simulation import RECALL, Ints, Parts
from formats.bundle import BundleLayout
from offload.copy_ahead import CopyAhead
from offload.devices.base import ExpertBatch, Span
from offload.devices.host import HostDevice
from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import CHUNK_NBYTES, Link, LinkReader
from offload.moe.costs import ObservedCosts
from offload.moe.layer import ExpertsLayer
from offload.moe.tiered_step import Accelerated, tiered_step
from offload.tiers.accelerated import TierPair
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import ReadEngine, ReadRequest
from prefetch.policies.geometry import Geometry
from prefetch.policies.lru import LruPolicy
from prefetch.policies.named import make_policy
from prefetch.scheduler.records import LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler
from prefetch.traces.trace import LayerStep, RoutingTrace

HIDDEN, INTERMEDIATE = 64, 32
"""Of the experts that are computed."""

EXPERT_COPY_S = 4e-3
"""Seconds of a copy in fact: all modelled seconds are stretched by one factor, so that waiting is exact enough."""


class PacedCpu(HostDevice):
    """The host's kernels, each call as long as the modelled CPU would take."""

    def __init__(self, costs: LayerCosts) -> None:
        self.costs = costs

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Returns when the modelled CPU is done."""
        until = time.monotonic() + _seconds(batch, self.costs.cpu_expert_s, self.costs.cpu_token_s)
        super().run_experts(layer, batch, hidden, out)
        _sleep_until(until)


class PacedAccelerator(HostAccelerator):
    """An accelerator whose calls return at once; `synchronise` returns when the modelled GPU is done with them."""

    def __init__(self, budget_nbytes: int, link: Link, costs: LayerCosts) -> None:
        super().__init__(budget_nbytes, link)
        self.costs = costs
        self._free_at = 0.0

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """The outputs are there at once, the time is booked."""
        begin = max(time.monotonic(), self._free_at)
        super().run_experts(layer, batch, hidden, out)
        self._free_at = begin + _seconds(batch, self.costs.gpu_expert_s, self.costs.gpu_token_s)

    def synchronise(self) -> None:
        """Wait for what is booked."""
        _sleep_until(self._free_at)


def _seconds(batch: ExpertBatch, expert_s: float, token_s: float) -> float:
    return len(batch.addresses) * expert_s + int(batch.offsets[-1]) * token_s


def _sleep_until(moment: float) -> None:
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)


class KnownCosts(ObservedCosts):
    """What the scheduler is told is what devices take."""

    def __init__(self, link: Link, costs: LayerCosts) -> None:
        super().__init__(link, 1.0)
        self.costs = costs

    def of_layer(self, bundle_nbytes: int) -> LayerCosts:
        """The modelled ones."""
        return self.costs


class MemoryStore:
    """Bundles in memory, read as from a disk that takes no time; everything is in RAM before anything is timed."""

    def __init__(self, bundles: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        self.bundles = bundles
        self.paths = (Path("memory"),)
        self.direct, self.bytes_read, self.retries = True, 0, 0

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        """Fill `out`."""
        del shard
        out[:] = self.bundles.reshape(-1)[offset : offset + len(out)].data

    def close(self) -> None:
        """Nothing is held."""

    def renew_lock(self) -> None:
        """There is none."""


class Execution:
    """One model's layers on tiers of their own."""

    def __init__(self, model: Model, cached: float, parts: Parts, seed: int = 0) -> None:
        self.model, self.parts = model, parts
        self.layout = BundleLayout(HIDDEN, INTERMEDIATE, "fp32", True, False)
        stretch = EXPERT_COPY_S / model.costs.link_expert_s
        self.stretch = stretch
        self.costs = _stretched(model.costs, stretch)
        chance = np.random.default_rng(seed)
        count = model.layers * model.experts
        weights = chance.standard_normal((count, self.layout.nbytes // 4)).astype(np.float32) / 8
        self._bundles = weights.view(np.uint8)
        self._checksums = [xxhash.xxh3_64_intdigest(bundle) for bundle in self._bundles]
        geometry = Geometry.uniform(model.layers, model.experts)
        self.cpu = PacedCpu(self.costs)
        self._reads = ReadEngine(MemoryStore(self._bundles), threads=1, chunk_nbytes=1 << 20)
        arena = Arena(self.cpu, self.layout.nbytes, count)
        below = ExpertTier(arena, LruPolicy(), self._reads, self._locate, lambda _key: self.layout.nbytes)
        slots = model.layers * max(1, round(cached * model.experts))
        link = Link(self.layout.nbytes / EXPERT_COPY_S, 0.0)
        self.accelerator = PacedAccelerator(slots * self.layout.nbytes, link, self.costs)
        policy = make_policy("auto" if parts.caching else "lru", geometry)
        copies = ReadEngine(LinkReader(link), threads=1, chunk_nbytes=CHUNK_NBYTES)
        upper = Arena(self.accelerator, self.layout.nbytes, slots)
        above = ExpertTier(upper, policy, copies, self._locate_in_ram, lambda _key: self.layout.nbytes)
        self.pair = TierPair(above, below)
        told = _told(self.costs, parts)
        costs = KnownCosts(link, told)
        self.accelerated = Accelerated(self.pair, self.cpu, self.accelerator, costs)
        self.layers = [
            ExpertsLayer(
                f"layers.{index}", index * model.experts, model.experts, self.layout, torch.float32,
                torch.nn.Module(), "silu",
            )
            for index in range(model.layers)
        ]  # fmt: skip
        self._ahead: CopyAhead | None = None
        if parts.prefetch:
            # Copies ahead take the link's time even where copies in a layer are off.
            always = Accelerated(self.pair, self.cpu, self.accelerator, KnownCosts(link, self.costs))
            # Layers to come are scheduled as the parts say, too.
            self._ahead = CopyAhead(always, self.layers, geometry, lambda _costs: LayerScheduler(told))
        self._chance = np.random.default_rng(seed + 1)
        self._layer_s = 0.0
        self._preload(cached)

    def _preload(self, cached: float) -> None:
        self.pair.below.fetch(range(self.model.layers * self.model.experts), lambda _key: None)
        held = max(1, round(cached * self.model.experts))
        for layer in range(self.model.layers):
            self.pair.preload(range(layer * self.model.experts, layer * self.model.experts + held), lambda _key: None)

    def _locate(self, key: int, out: Span) -> ReadRequest:
        return ReadRequest(0, key * self.layout.nbytes, out, self._checksums[key], f"expert {key}")

    def _locate_in_ram(self, key: int, out: Span) -> ReadRequest:
        return ReadRequest(0, self.pair.below.address(key), out, self._checksums[key], f"the copy of expert {key}")

    def run(self, trace: RoutingTrace, first_pass: int) -> tuple[float, list[torch.Tensor]]:
        """Seconds from `first_pass` on, unstretched, and what every layer gave."""
        outputs = []
        begun = time.monotonic()
        for index in range(trace.passes):
            if index == first_pass:
                begun = time.monotonic()
            tokens = trace.experts[trace.pass_starts[index] : trace.pass_starts[index + 1]]
            for layer in range(self.model.layers):
                following = trace.step(index, layer + 1) if layer + 1 < self.model.layers else None
                outputs.append(self._layer(layer, tokens[:, layer].astype(np.int64), following))
        return (time.monotonic() - begun) / self.stretch, outputs

    def _layer(self, layer: int, experts: Ints, following: LayerStep | None) -> torch.Tensor:
        tokens, begun = len(experts), time.monotonic()
        generator = torch.Generator().manual_seed(int(experts.sum()) + layer)
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        weights = torch.full(experts.shape, 1.0 / experts.shape[1])
        watch = _Watch(self, layer, following, prefill=tokens > 1)
        out = tiered_step(self.layers[layer], self.accelerated, hidden, torch.from_numpy(experts), weights, watch)
        self.accelerator.synchronise()
        if self._ahead is not None:
            self._ahead.end_layer(layer)
        _sleep_until(time.monotonic() + self.stretch * self.model.dense_s(tokens))
        self._layer_s += 0.1 * (time.monotonic() - begun - self._layer_s) if self._layer_s else time.monotonic() - begun
        return out

    def look_ahead(self, layer: int, following: LayerStep) -> None:
        """Copy what is predicted of the next layer; predictions are right with probability RECALL."""
        if self._ahead is None:
            return
        count = self.model.experts
        probabilities = np.full(count, (1 - RECALL) * len(following.experts) / count)
        for expert in following.experts.tolist():
            right = self._chance.random() < RECALL
            probabilities[expert if right else int(self._chance.integers(0, count))] = RECALL
        self.pair.above.policy.on_forecast((layer + 1) * count, probabilities)
        self._ahead.copy(layer + 1, probabilities, self._layer_s)

    def close(self) -> None:
        """End the readers."""
        self.pair.end_copies()
        self.pair.check()
        self.pair.above.engine.close()
        self._reads.close()


class _Watch:
    """A step's watch."""

    def __init__(self, execution: Execution, layer: int, following: LayerStep | None, *, prefill: bool) -> None:
        self.prefill = prefill
        self._execution, self._layer, self._following = execution, layer, following

    def loads_started(self) -> None:
        """The step's own copies are under way."""
        if self._following is not None:
            self._execution.look_ahead(self._layer, self._following)

    def waiting(self) -> None:
        """Nothing is learnt."""


def _told(costs: LayerCosts, parts: Parts) -> LayerCosts:
    """Costs with which the scheduler does what the parts say: with endless ones it maps statically."""
    if parts.copy_all:
        return replace(costs, cpu_expert_s=1e6)
    if parts.scheduling:
        return costs
    return replace(costs, link_expert_s=float("inf"), gpu_expert_s=0.0, gpu_token_s=0.0)


def _stretched(costs: LayerCosts, factor: float) -> LayerCosts:
    return replace(costs, **{name: factor * getattr(costs, name) for name in vars(costs)})
