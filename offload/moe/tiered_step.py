"""The MoE step over three tiers: route → schedule → execute on CPU, accelerator and link → combine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch

from offload.devices.base import Accelerator, Device, ExpertBatch, Work
from offload.errors import DoesNotFitError, SlowDeviceWarning
from offload.moe.accumulate import Accumulator, OrderedAccumulator, make_accumulator
from offload.moe.costs import ObservedCosts
from offload.moe.in_order import borrowed_in_order
from offload.moe.layer import ExpertsLayer
from offload.moe.routing import Routing, route
from offload.moe.schedule import places_to_copy
from offload.moe.step import StepWatch, compute_borrowed, shares_of, start_borrowed
from offload.moe.tiered_prefill import Prefill, PromptPopularity
from offload.tiers.accelerated import TierPair
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.records import Home


@dataclass
class Accelerated:
    """What a step over three tiers works with.

    Attributes:
        tiers: where experts are.
        host: computes those below.
        accelerator: computes those above.
        costs: what schedules are made from.
        popularity: which experts prompts are routed to.
        scheduler: says what is copied, and in which order experts below are computed.
    """

    tiers: TierPair
    host: Device
    accelerator: Accelerator
    costs: ObservedCosts
    popularity: PromptPopularity = field(default_factory=PromptPopularity)
    scheduler: StepScheduler = field(default_factory=EarliestCompletion)


def tiered_step(
    layer: ExpertsLayer,
    accelerated: Accelerated,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    watch: StepWatch | None = None,
) -> torch.Tensor:
    """What `moe_step` computes, with an accelerator's tier above the host's.

    Few pairs: each missing expert runs on the CPU in place, or is copied first, as the scheduler says. Where that turns
    out not to be possible (every slot above is in use), it runs on the CPU. Many pairs: see `tiered_prefill`. An
    expert whose copy ahead is still on its way is one of those below: its copy is waited for, or it is computed there
    beside the copy.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read or copied; both tiers are whole.
        PartError: the scheduler named what cannot be copied; likewise.
    """
    routing = route(top_k_index, top_k_weights, layer.count)
    accumulator = make_accumulator(routing, hidden.shape[-1], accelerated=True)
    step = _Step(layer, accelerated, hidden.contiguous(), routing, accumulator, watch)
    try:
        if isinstance(accumulator, OrderedAccumulator):
            step.run_in_order(accumulator)
        elif accelerated.scheduler.as_they_come:
            step.run()
        else:
            step.run_in_turn()
    except BaseException:
        # What was started reads slots that abandoned experts may lose.
        accelerated.accelerator.synchronise()
        accelerated.tiers.abandon()
        raise
    return accumulator.result().to(hidden.device, hidden.dtype)


def retried_step(
    layer: ExpertsLayer,
    accelerated: Accelerated,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    watch: StepWatch | None = None,
) -> torch.Tensor:
    """`tiered_step`; where the accelerator runs out of memory, once more with a slab of expert slots less, and said so.

    Raises:
        DoesNotFitError: there is no slab to give up.
        torch.OutOfMemoryError: that was not enough.
        As `tiered_step`.
    """
    try:
        return tiered_step(layer, accelerated, hidden, top_k_index, top_k_weights, watch)
    except torch.OutOfMemoryError as error:
        if not leave_more_memory(accelerated):
            raise DoesNotFitError(
                f"{accelerated.accelerator.name}: no memory for {len(hidden)} tokens of {layer.name}, and the last "
                f"slab of {accelerated.tiers.above.table.usable_slots} expert slots is needed; take a shorter prompt "
                "or a smaller batch"
            ) from error
    return tiered_step(layer, accelerated, hidden, top_k_index, top_k_weights, watch)


def leave_more_memory(accelerated: Accelerated) -> bool:
    """Between steps, after the accelerator ran out of memory: give up a slab of expert slots, and say so.

    Returns:
        Whether there was one to give up.
    """
    above = accelerated.tiers.above
    accelerated.tiers.end_copies()
    given_up = above.give_up_slab()
    if given_up:
        warnings.warn(
            f"{accelerated.accelerator.name} ran out of memory: {given_up} expert slots were given up, "
            f"{above.table.usable_slots} are left; load with a smaller vram= to leave more from the start",
            SlowDeviceWarning,
            stacklevel=3,
        )
    return given_up > 0


@dataclass
class _Step:
    layer: ExpertsLayer
    accelerated: Accelerated
    hidden: torch.Tensor
    routing: Routing
    accumulator: Accumulator
    watch: StepWatch | None
    on_host: torch.Tensor = field(init=False)
    number: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.on_host = self.hidden.to("cpu")
        self.number = {self.layer.first_key + expert: index for index, expert in enumerate(self.routing.experts)}

    def run(self) -> None:
        """Copies start first, then what is resident computes, on both devices, then what arrives."""
        tiers = self.accelerated.tiers
        above, below = tiers.above, tiers.below
        self.accelerated.popularity.decoding()
        cached, resident, missing = tiers.borrow(list(self.number), shares_of(self.routing, self.watch))
        below.start_loads(missing)
        to_copy = self._schedule(cached, resident, missing)
        copying = self._start_copies([key for key in resident if key in to_copy], [])
        if self.watch is not None:
            self.watch.loads_started()
        finish = self._start_above(cached)
        self._on_cpu([key for key in resident if key not in copying])
        finish()
        while missing or copying:
            if missing and (self._start_loads(missing) or not copying):
                arrived = self._collect(missing)
                missing = [key for key in missing if key not in arrived]
                copying = self._start_copies([key for key in arrived if key in to_copy], copying)
                self._on_cpu([key for key in arrived if key not in copying])
                copying = self._finish_copies(copying, above.poll(copying))
            else:
                above.start_loads(copying)
                copying = self._finish_copies(copying, above.collect(copying))

    def run_in_turn(self) -> None:
        """Experts below in ascending order, each waited for: computed there, or copied where a slot can be spared."""
        tiers = self.accelerated.tiers
        self.accelerated.popularity.decoding()
        cached, rest, shares, to_copy = self._borrow_above()
        if not rest:
            self._loads_started()
        finish = self._start_above(cached)
        in_turn = borrowed_in_order(tiers.below, rest, shares, begun=self._loads_started)
        copying: list[int] = []
        keeps: bool | None = None
        for _ in rest:
            (key,) = in_turn.send(keeps)
            keeps = True
            started = self._start_copies([key] if key in to_copy and self._can_hold(copying) else [], copying)
            if started == copying:
                self._on_cpu([key])
            copying = self._finish_copies(started, tiers.above.poll(started))
        in_turn.close()
        finish()
        while copying:
            tiers.above.start_loads(copying)
            copying = self._finish_copies(copying, tiers.above.collect(copying))

    def _loads_started(self) -> None:
        if self.watch is not None:
            self.watch.loads_started()
        if self.accelerated.tiers.held >= self.accelerated.tiers.below.table.usable_slots:
            # What is needed now must have a slot to come to.
            self.accelerated.tiers.end_copies()

    def _can_hold(self, copying: list[int]) -> bool:
        """Whether a slot below is left for others if one more is kept there until it is copied."""
        tiers = self.accelerated.tiers
        return len(copying) + tiers.held + 2 <= tiers.below.table.usable_slots

    def run_in_order(self, accumulator: OrderedAccumulator) -> None:
        """Sums of many pairs are in the order of experts, whatever is where."""
        loads = np.diff(self.routing.offsets).tolist()
        self.accelerated.popularity.note({key: loads[number] for key, number in self.number.items()})
        cached, rest, shares, to_copy = self._borrow_above()
        prefill = Prefill(
            self.accelerated.tiers, self.accelerated.popularity, self.routing, accumulator, self._start_in_order
        )
        prefill.run(self.number, set(cached), rest, to_copy, shares)

    def _borrow_above(self) -> tuple[list[int], list[int], list[float] | None, set[int]]:
        """The experts that are borrowed above, the others, ascending, their shares, and which of them to copy."""
        above, below = self.accelerated.tiers.above, self.accelerated.tiers.below
        # Experts below move as they please: nothing may be reading them.
        self.accelerated.tiers.end_copies()
        shares = shares_of(self.routing, self.watch)
        cached, rest = above.borrow(list(self.number), shares)
        if shares is not None:
            shares = [shares[self.number[key]] for key in rest]
        resident = [key for key in rest if below.holds(key)]
        return cached, rest, shares, self._schedule(cached, resident, [key for key in rest if key not in resident])

    def _start_in_order(self, keys: Sequence[int], *, above: bool, out: torch.Tensor) -> Work:
        """Start borrowed experts, their outputs in the order of their pairs."""
        tiers = self.accelerated.tiers
        tier, device = (tiers.above, self.accelerated.accelerator) if above else (tiers.below, self.accelerated.host)
        offsets, pairs = self.routing.select([self.number[key] for key in keys])
        tokens = self.routing.tokens[pairs]
        batch = ExpertBatch(tier.addresses(keys), offsets, tokens, np.arange(len(tokens)))
        return device.start_experts(self.layer, batch, self.hidden if above else self.on_host, out)

    def _schedule(self, cached: list[int], resident: list[int], missing: list[int]) -> set[int]:
        """The experts that are to be copied."""
        if not resident and not missing:
            return set()
        keys = [*cached, *resident, *missing]
        homes = [Home.VRAM] * len(cached) + [Home.RAM] * len(resident) + [Home.DISK] * len(missing)
        pairs = np.diff(self.routing.offsets)
        loads = [int(pairs[self.number[key]]) for key in keys]
        costs = self.accelerated.costs.of_layer(self.layer.layout.nbytes)
        return {keys[place] for place in places_to_copy(self.accelerated.scheduler, loads, homes, costs)}

    def _start_copies(self, keys: Sequence[int], copying: list[int]) -> list[int]:
        """Those under way and those of `keys`, borrowed below, for which there was a slot above; all stay borrowed."""
        for key in keys:
            if self.accelerated.tiers.start_copy(key, copying):
                copying = [*copying, key]
        return copying

    def _finish_copies(self, copying: list[int], arrived: list[int]) -> list[int]:
        self.accelerated.tiers.give_back(arrived)
        self._start_above(arrived)()
        return [key for key in copying if key not in arrived]

    def _start_loads(self, missing: list[int]) -> int:
        tiers = self.accelerated.tiers
        started = tiers.below.start_loads(missing)
        if not started and tiers.held:
            # Copies ahead hold what slots there are: what is needed now comes first.
            tiers.end_copies()
            started = tiers.below.start_loads(missing)
        return started

    def _collect(self, missing: list[int]) -> list[int]:
        below = self.accelerated.tiers.below
        before = below.counters.stall_s
        arrived = below.collect(missing)
        self.accelerated.costs.saw_disk(len(arrived) * self.layer.layout.nbytes, below.counters.stall_s - before)
        return arrived

    def _start_above(self, keys: Sequence[int]) -> Callable[[], None]:
        """Start borrowed experts on the accelerator; what is returned waits for them and gives them back."""
        tiers = self.accelerated.tiers
        if not keys:
            return lambda: None
        finish = start_borrowed(
            self.layer, tiers.above, self.accelerated.accelerator, self.hidden, self.routing, self.accumulator,
            self._work(keys),
        )  # fmt: skip

        def finish_and_give_back() -> None:
            finish()
            tiers.above.give_back(keys)

        return finish_and_give_back

    def _on_cpu(self, keys: Sequence[int]) -> None:
        if not keys:
            return
        below, before = self.accelerated.tiers.below, perf_counter()
        compute_borrowed(
            self.layer, below, self.accelerated.host, self.on_host, self.routing, self.accumulator, self._work(keys)
        )
        self.accelerated.tiers.give_back(keys)
        self.accelerated.costs.saw_cpu(len(keys) * self.layer.layout.nbytes, perf_counter() - before)

    def _work(self, keys: Sequence[int]) -> list[tuple[int, int]]:
        return [(key, self.number[key]) for key in keys]
