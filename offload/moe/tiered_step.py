"""The MoE step over three tiers: route → schedule → execute on CPU, accelerator and link → combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch

from offload.devices.base import Device
from offload.moe.accumulate import Accumulator, make_accumulator
from offload.moe.costs import ObservedCosts
from offload.moe.in_order import borrowed_in_order
from offload.moe.layer import ExpertsLayer
from offload.moe.routing import Routing, route
from offload.moe.step import compute_borrowed
from offload.tiers.accelerated import TierPair
from offload.tiers.expert_tier import ExpertTier
from prefetch.scheduler.records import Home
from prefetch.scheduler.scheduler import LayerScheduler


@dataclass
class Accelerated:
    """What a step over three tiers works with.

    Attributes:
        tiers: where experts are.
        host: computes those below.
        accelerator: computes those above.
        costs: what schedules are made from.
    """

    tiers: TierPair
    host: Device
    accelerator: Device
    costs: ObservedCosts


def tiered_step(
    layer: ExpertsLayer,
    accelerated: Accelerated,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What `moe_step` computes, with an accelerator's tier above the host's.

    Few pairs: each missing expert runs on the CPU in place, or is copied first, as the schedule says. Where that turns
    out not to be possible (every slot above is in use), it runs on the CPU. Many pairs: experts compute in ascending
    order, those above on the accelerator, and nothing is copied.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read or copied; both tiers are whole.
    """
    routing = route(top_k_index, top_k_weights, layer.count)
    accumulator = make_accumulator(routing, hidden.shape[-1])
    step = _Step(layer, accelerated, hidden.contiguous(), routing, accumulator)
    try:
        if accumulator.ordered:
            step.run_in_order()
        else:
            step.run()
    except BaseException:
        accelerated.tiers.abandon()
        raise
    return accumulator.result().to(hidden.dtype)


@dataclass
class _Step:
    layer: ExpertsLayer
    accelerated: Accelerated
    hidden: torch.Tensor
    routing: Routing
    accumulator: Accumulator
    number: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.number = {self.layer.first_key + expert: index for index, expert in enumerate(self.routing.experts)}

    def run(self) -> None:
        """Copies start first, then what is resident computes, then what arrives."""
        above, below = self.accelerated.tiers.above, self.accelerated.tiers.below
        cached, rest = above.borrow(list(self.number))
        resident, missing = below.borrow(rest)
        below.start_loads(missing)
        to_copy = self._schedule(cached, resident, missing)
        copying = self._start_copies([key for key in resident if key in to_copy], [])
        self._compute(above, self.accelerated.accelerator, cached)
        self._on_cpu([key for key in resident if key not in copying])
        while missing or copying:
            if missing and (below.start_loads(missing) or not copying):
                arrived = self._collect(missing)
                missing = [key for key in missing if key not in arrived]
                copying = self._start_copies([key for key in arrived if key in to_copy], copying)
                self._on_cpu([key for key in arrived if key not in copying])
                copying = self._finish_copies(copying, above.poll(copying))
            else:
                above.start_loads(copying)
                copying = self._finish_copies(copying, above.collect(copying))

    def run_in_order(self) -> None:
        """Sums of many pairs are in the order of experts, whatever is where."""
        above, below = self.accelerated.tiers.above, self.accelerated.tiers.below
        cached, rest = above.borrow(list(self.number))
        held = set(cached)
        in_turn = borrowed_in_order(below, rest)
        for key in self.number:
            if key in held:
                self._compute(above, self.accelerated.accelerator, [key])
            else:
                self._compute_on(below, self.accelerated.host, [next(in_turn)])
        # The last one is given back when the next is asked for.
        next(in_turn, None)

    def _schedule(self, cached: list[int], resident: list[int], missing: list[int]) -> set[int]:
        """The experts that are to be copied."""
        if not resident and not missing:
            return set()
        keys = [*cached, *resident, *missing]
        homes = [Home.VRAM] * len(cached) + [Home.RAM] * len(resident) + [Home.DISK] * len(missing)
        pairs = np.diff(self.routing.offsets)
        loads = [int(pairs[self.number[key]]) for key in keys]
        costs = self.accelerated.costs.of_layer(self.layer.layout.nbytes)
        return {keys[place] for place in LayerScheduler(costs).schedule(loads, homes).transfers.tolist()}

    def _start_copies(self, keys: Sequence[int], copying: list[int]) -> list[int]:
        """Those under way and those of `keys`, borrowed below, for which there was a slot above; all stay borrowed."""
        for key in keys:
            if self.accelerated.tiers.start_copy(key, copying):
                copying = [*copying, key]
        return copying

    def _finish_copies(self, copying: list[int], arrived: list[int]) -> list[int]:
        self.accelerated.tiers.below.give_back(arrived)
        self._compute(self.accelerated.tiers.above, self.accelerated.accelerator, arrived)
        return [key for key in copying if key not in arrived]

    def _collect(self, missing: list[int]) -> list[int]:
        below = self.accelerated.tiers.below
        before = below.counters.stall_s
        arrived = below.collect(missing)
        self.accelerated.costs.saw_disk(len(arrived) * self.layer.layout.nbytes, below.counters.stall_s - before)
        return arrived

    def _on_cpu(self, keys: Sequence[int]) -> None:
        before = perf_counter()
        self._compute(self.accelerated.tiers.below, self.accelerated.host, keys)
        self.accelerated.costs.saw_cpu(len(keys) * self.layer.layout.nbytes, perf_counter() - before)

    def _compute(self, tier: ExpertTier, device: Device, keys: Sequence[int]) -> None:
        """Compute borrowed experts and give them back."""
        if keys:
            self._compute_on(tier, device, keys)
            tier.give_back(keys)

    def _compute_on(self, tier: ExpertTier, device: Device, keys: Sequence[int]) -> None:
        work = [(key, self.number[key]) for key in keys]
        compute_borrowed(self.layer, tier, device, self.hidden, self.routing, self.accumulator, work)
