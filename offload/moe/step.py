"""The MoE step: route → schedule → execute → combine → observe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from offload.devices.base import Device, ExpertBatch
from offload.moe.accumulate import Accumulator, make_accumulator
from offload.moe.in_order import borrowed_in_order
from offload.moe.layer import ExpertsLayer
from offload.moe.routing import Routing, route
from offload.tiers.expert_tier import ExpertTier


class StepWatch(Protocol):
    """Who is told of a step while it runs.

    Attributes:
        prefill: whether the pass has several tokens of a sequence.
    """

    prefill: bool

    def loads_started(self) -> None:
        """What the step needs is borrowed or being read; reads for later layers may follow."""

    def waiting(self) -> None:
        """What is here is computed and the rest is on its way: told at most once, and not of every step."""


def moe_step(
    layer: ExpertsLayer,
    tier: ExpertTier,
    device: Device,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    watch: StepWatch | None = None,
    *,
    in_turn: bool = False,
) -> torch.Tensor:
    """out[t] = sum over k of weight[t, k] * expert(index[t, k])(hidden[t]), every expert read at most once.

    Args:
        layer: the layer.
        tier: where its experts are or come to be.
        device: computes them.
        hidden: [T, H] in the model's dtype.
        top_k_index: integer [T, k].
        top_k_weights: [T, k].
        watch: told of the step; None where nobody wants to know.
        in_turn: compute experts in ascending order, each waited for in turn, instead of as they come.

    Returns:
        [T, H] in the model's dtype; does not depend on what was resident, nor on `in_turn`.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read; the tier is as before the step.
    """
    routing = route(top_k_index, top_k_weights, layer.count)
    accumulator = make_accumulator(routing, hidden.shape[-1])
    execute = _in_order if accumulator.ordered or in_turn else _as_they_come
    try:
        execute(layer, tier, device, hidden.contiguous(), routing, accumulator, watch)
    except BaseException:
        tier.abandon()
        raise
    return accumulator.result().to(hidden.dtype)


def _as_they_come(
    layer: ExpertsLayer,
    tier: ExpertTier,
    device: Device,
    hidden: torch.Tensor,
    routing: Routing,
    accumulator: Accumulator,
    watch: StepWatch | None,
) -> None:
    """Experts compute in the order in which they are there."""
    number = {layer.first_key + expert: index for index, expert in enumerate(routing.experts)}
    borrowed, missing = tier.borrow(list(number), shares_of(routing, watch))
    if len(hidden) > 1:
        # While experts with many tokens compute, those with few load.
        loads = np.diff(routing.offsets)
        missing.sort(key=lambda key: -int(loads[number[key]]))

    def compute(keys: list[int]) -> None:
        compute_borrowed(layer, tier, device, hidden, routing, accumulator, [(key, number[key]) for key in keys])

    as_they_come(tier, borrowed, missing, compute, watch)


def as_they_come(
    tier: ExpertTier,
    borrowed: list[int],
    missing: list[int],
    compute: Callable[[list[int]], None],
    watch: StepWatch | None,
) -> None:
    """Compute resident experts while misses load, and each miss when it arrives.

    Args:
        tier: where the experts are or come to be.
        borrowed: what it lent; given back when computed.
        missing: the others, in the order in which they are to load.
        compute: computes some of them, which are borrowed.
        watch: told when all loads have begun for which there are slots, before anything is computed: what follows is to
            be read while that is.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read.
    """
    tier.start_loads(missing)
    if watch is not None:
        watch.loads_started()
    told = False
    while borrowed or missing:
        if borrowed:
            compute(borrowed)
            tier.give_back(borrowed)
        if not tier.has_slots_for(missing):
            tier.start_loads(missing)
        if missing and watch is not None and not told:
            told = True
            watch.waiting()
        borrowed = tier.collect(missing) if missing else []
        missing = [key for key in missing if key not in borrowed]


def _in_order(
    layer: ExpertsLayer,
    tier: ExpertTier,
    device: Device,
    hidden: torch.Tensor,
    routing: Routing,
    accumulator: Accumulator,
    watch: StepWatch | None,
) -> None:
    """Experts compute in ascending order, in groups of what is there, while those ahead load."""
    keys = [layer.first_key + expert for expert in routing.experts]
    sizes = np.diff(routing.offsets).tolist()
    done = 0
    begun = None if watch is None else watch.loads_started
    for group in borrowed_in_order(tier, keys, shares_of(routing, watch), sizes, accumulator.most_pairs, begun):
        work = list(zip(group, range(done, done + len(group)), strict=True))
        compute_borrowed(layer, tier, device, hidden, routing, accumulator, work)
        done += len(group)


def shares_of(routing: Routing, watch: StepWatch | None) -> list[float] | None:
    """For the cache policy: shares of tokens at prefill."""
    if watch is None or not watch.prefill:
        return None
    shares: list[float] = (np.diff(routing.offsets) / len(routing.weights)).tolist()
    return shares


def compute_borrowed(
    layer: ExpertsLayer,
    tier: ExpertTier,
    device: Device,
    hidden: torch.Tensor,
    routing: Routing,
    accumulator: Accumulator,
    work: list[tuple[int, int]],
) -> None:
    """Compute borrowed experts, given as (key, number in the routing), with one call to the device."""
    start_borrowed(layer, tier, device, hidden, routing, accumulator, work)()


def start_borrowed(
    layer: ExpertsLayer,
    tier: ExpertTier,
    device: Device,
    hidden: torch.Tensor,
    routing: Routing,
    accumulator: Accumulator,
    work: list[tuple[int, int]],
) -> Callable[[], None]:
    """Begin what `compute_borrowed` does; what is returned waits for the outputs."""
    offsets, pairs = routing.select([number for _, number in work])
    out, rows = accumulator.target(pairs)
    addresses = tier.addresses(key for key, _ in work)
    started = device.start_experts(layer, ExpertBatch(addresses, offsets, routing.tokens[pairs], rows), hidden, out)

    def finish() -> None:
        started.finish()
        accumulator.added(pairs)

    return finish
