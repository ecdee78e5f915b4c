"""The runtime of one model: tiers, device and counters, from load to close."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch

from offload.devices.base import Accelerator, Device
from offload.devices.host_threads import short_waits
from offload.devices.link import CHUNK_NBYTES
from offload.errors import ClosedError, UnsupportedOperationError
from offload.expert_places import ExpertPlaces
from offload.fork_guard import hold_at_fork
from offload.hf.dense_placement import DensePlacement
from offload.kv.paging import Paging
from offload.learnt import save_learnt
from offload.moe.costs import ObservedCosts
from offload.moe.layer import ExpertsLayer
from offload.moe.step import moe_step
from offload.moe.taped_step import taped_step
from offload.moe.tiered_step import Accelerated, leave_more_memory, retried_step
from offload.observer import StepObserver
from offload.reconciliation import MemoryUse, Reconciliation, reconcile
from offload.recorder import TraceRecorder
from offload.room import ForwardPass, Room
from offload.statistics import (
    AcceleratorStatistics,
    Passes,
    Statistics,
    accelerator_statistics,
    prefetch_figures,
)
from offload.store.progress import Progress
from offload.store.store import ExpertStore
from offload.tiers.accelerated import TierPair
from offload.tiers.arena import Arena
from offload.tiers.counters import TierCounters
from offload.tiers.direct_engine import make_engine
from offload.tiers.disk import ShardReader
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import ReadEngine
from placement.model_spec import ModelSpec
from placement.plan import Plan
from prefetch.learning import Learner
from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.lru import LruPolicy
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.named import name_of as scheduler_name
from prefetch.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from offload.hf.graphs.runner import StepGraphs
    from offload.hf.paged.prefixes import Prefixes


Queue = Callable[[ExpertsLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What a step queues for a layer while it is captured: (layer, hidden, top_k_index, top_k_weights) → [T, H]."""


def _do_nothing() -> None:
    """Where there is nothing to end."""


class Runtime:
    """Executes a plan. Steps are serialised: several threads may generate on one model."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        store: ExpertStore,
        layers: Sequence[ExpertsLayer],
        device: Device,
        policy: CachePolicy,
        accelerator: Accelerator | None = None,
        accelerator_policy: CachePolicy | None = None,
        scheduler: StepScheduler | None = None,
    ) -> None:
        self.plan = plan
        self.spec = spec
        self.store = store
        self.layers = tuple(layers)
        self.device = device
        self.lock = threading.RLock()
        self._places = ExpertPlaces(self.layers, store, lambda key: self.tier.address(key))
        reader = ShardReader(store.shard_paths, lambda index, direct: store.open_shard(index, direct=direct))
        engine = make_engine(reader, threads=plan.reader_threads, chunk_nbytes=plan.read_chunk_nbytes, most_soon=1)
        arena = Arena(device, plan.slot_nbytes, plan.ram_slots)
        self.tier = ExpertTier(arena, policy, engine, self._places.in_store, self._places.nbytes)
        self.geometry = Geometry(tuple(layer.count for layer in self.layers))
        self.observer = StepObserver()
        self.scheduler = EarliestCompletion() if scheduler is None else scheduler
        self._number = {layer.first_key: index for index, layer in enumerate(self.layers)}
        self.accelerated = None if accelerator is None else self._above(accelerator, accelerator_policy)
        end_copies = _do_nothing if self.accelerated is None else self.accelerated.tiers.end_copies
        self._room = Room(plan, spec, self.tier, self.lock, end_copies)
        self.fused: dict[str, int] = {}
        self.paging: Paging | None = None
        self.prefixes: Prefixes | None = None
        self.dense: DensePlacement | None = None
        self._dense_copied_before = 0
        self.graphs: StepGraphs | None = None
        self.queue: Queue | None = None
        self.memory: MemoryUse | None = None
        self.learners: dict[str, Learner] = {}
        self.closed = self._released = self._decoded = False
        self._waits_shortly = False
        self._end_waits: Callable[[], object] = _do_nothing
        self.reset_stats()
        hold_at_fork(self)

    def _above(self, accelerator: Accelerator, policy: CachePolicy | None) -> Accelerated:
        """The accelerator's tier, above the host's."""
        slots = 0 if self.plan.vram is None else self.plan.vram.slots
        engine = ReadEngine(
            accelerator.copy_reader(), threads=accelerator.copy_threads, chunk_nbytes=CHUNK_NBYTES
        )  # fmt: skip
        arena = Arena(accelerator, self.plan.slot_nbytes, slots)
        above = ExpertTier(arena, policy or LruPolicy(), engine, self._places.in_ram, self._places.nbytes)
        costs = ObservedCosts(accelerator.link, accelerator.memory_bytes_per_s)
        return Accelerated(TierPair(above, self.tier), self.device, accelerator, costs, scheduler=self.scheduler)

    # --- running ---------------------------------------------------------------------------------------------

    def step(
        self, layer: ExpertsLayer, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One MoE layer of one forward pass; see `moe_step`.

        Raises:
            ClosedError: after `close()`.
            UnsupportedOperationError: gradients are asked for.
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UnsupportedOperationError(
                "an offloaded model computes no gradients: its experts are not parameters; use torch.no_grad()"
            )
        with self.lock, torch.no_grad():
            if self.queue is not None:
                return self.queue(layer, hidden, top_k_index, top_k_weights)
            with self._observed(layer.first_key, top_k_index) as observer:
                if self.accelerated is None:
                    return moe_step(
                        layer, self.tier, self.device, hidden, top_k_index, top_k_weights, observer,
                        in_turn=not self.scheduler.as_they_come,
                    )  # fmt: skip
                return retried_step(layer, self.accelerated, hidden, top_k_index, top_k_weights, observer)

    @contextmanager
    def _observed(self, first_key: int, top_k_index: torch.Tensor | npt.NDArray[np.int64]) -> Iterator[StepObserver]:
        """One step of a layer, [T, k] chosen, watched and timed. Call with the lock."""
        self._check_open()
        before = perf_counter()
        observer = self.observer
        observer.begin(self._number[first_key])
        try:
            yield observer
        except BaseException:
            observer.failed()
            raise
        if observer.is_asked:
            chosen = top_k_index.numpy(force=True) if isinstance(top_k_index, torch.Tensor) else top_k_index
            observer.finished(chosen)
        self._moe_s += perf_counter() - before
        self._moe_steps += 1

    @property
    def come_to_tapes(self) -> bool:
        """Whether a tape may compute experts as they come: not with an accelerator, which computes its own."""
        return self.accelerated is None

    def step_taped(
        self,
        first_key: int,
        choice: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        compute: Callable[[], None],
    ) -> None:
        """One MoE layer whose experts a tape computes; see `taped_step`. Call with the lock.

        Args:
            first_key: of the layer's experts.
            choice: int64 [tokens, top_k], in the tape's memory.
            addresses: see `taped_step`.
            compute: see `taped_step`.
        """
        with self._observed(first_key, choice) as observer:
            observer.chosen(choice)
            experts = sorted(set(choice.reshape(-1).tolist()))
            in_turn = not self.scheduler.as_they_come
            taped_step(first_key, experts, addresses, compute, self.tier, observer, in_turn=in_turn)

    def addresses_of_all(self) -> npt.NDArray[np.int64] | None:
        """Int64 [experts], where each expert's bundle lies; None unless all are in RAM. Call with the lock.

        None with an accelerator too, whose experts are computed where they are, and while a trace is recorded: a tape
        would compute what nobody sees.

        Raises:
            ClosedError: after `close()`.
        """
        self._check_open()
        if self.accelerated is not None or self.observer.recorder is not None:
            return None
        return self.tier.addresses_of_all(self.plan.expert_count)

    def note_taped(self, layers: list[list[int]]) -> None:
        """A tape has computed these experts of each of some layers, ascending, all in RAM. Call with the lock."""
        self.tier.note_hits(layers)
        self._moe_steps += len(layers)

    def note_graph_step(self, routed: torch.Tensor, seconds: float) -> None:
        """A captured step was replayed. Call with the lock.

        Args:
            routed: int64 [layers, T, k].
            seconds: of the step.
        """
        if self.observer.is_asked:
            for number, top_k_index in enumerate(routed.numpy(force=True)):
                self.observer.begin(number)
                self.observer.finished(top_k_index)
        self._moe_steps += len(routed)
        self._moe_s += seconds

    def preload(self, progress: Progress) -> None:
        """Read experts in the order of their keys: into all of an accelerator's slots, then into the host's.

        The host's stay empty where slots do not hold all experts: they fill as experts are needed.

        Args:
            progress: told the bytes that arrived.

        Raises:
            StorageError, StoreCorruptError: an expert cannot be read.
        """
        count, slots = self.plan.expert_count, self.tier.table.usable_slots
        above = 0 if self.accelerated is None else min(count, self.accelerated.tiers.above.table.usable_slots)
        below = range(above, count) if above + slots >= count else range(0)
        keys = [*range(above), *below]
        progress.start(sum(map(self._places.nbytes, keys)), "Loading experts")

        def arrived(key: int) -> None:
            progress.advance(self._places.nbytes(key))

        try:
            with self.lock:
                self._check_open()
                if self.accelerated is not None:
                    self.accelerated.tiers.preload(range(above), arrived)
                self.tier.fetch(below, arrived)
        finally:
            progress.finish()

    def make_room(
        self, batch: int, tokens: int, past_tokens: int, *, all_logits: bool, cache: object | None = None
    ) -> None:
        """Before a forward pass: let expert slots go, or take them back, so that the budget holds.

        Args:
            batch: sequences.
            tokens: new tokens of each.
            past_tokens: tokens of each that are cached already.
            all_logits: the pass computes logits for every token, not only the last.
            cache: the KV cache that the pass extends; caches of other sequences that are alive count too.

        Raises:
            DoesNotFitError: even with the fewest slots the pass needs more than the budget.
            ClosedError: after `close()`.
        """
        self._check_open()
        self.observer.prefill = tokens > 1
        self._wait_shortly(decode=tokens == 1)
        self._room.make(ForwardPass(batch, tokens, past_tokens, all_logits), cache, self.paging)

    def _wait_shortly(self, *, decode: bool) -> None:
        """While experts are read for one token at a time, most of a pass is waiting, and readers need the cores."""
        wanted = decode and self.accelerated is None and self.plan.ram_slots < self.plan.expert_count
        if wanted == self._waits_shortly:
            return
        with self.lock:
            self._waits_shortly = wanted
            self._end_waits()
            waits = short_waits() if wanted and not self.closed else None
            self._end_waits = _do_nothing if waits is None else weakref.finalize(self, waits.close)

    def pass_failed(self, error: BaseException | None) -> None:
        """A forward pass ended with an error. Where an accelerator's memory ran out, the next pass has more of it: the
        one that failed has written a part of its KV cache, and is not repeated here.
        """
        if self.accelerated is not None and isinstance(error, torch.OutOfMemoryError):
            with self.lock:
                if not self.closed:
                    leave_more_memory(self.accelerated)

    def count_pass(self, tokens: int, *, decode: bool, seconds: float) -> None:
        """Note one finished forward pass of the whole model."""
        passes, self._decoded = self._passes, self._decoded or decode
        if decode:
            passes.decode_tokens += tokens
            passes.decode_s += seconds
            if self.observer.prefetcher is not None:
                self.observer.prefetcher.note_pass(seconds)
        else:
            passes.prefill_tokens += tokens
            passes.prefill_s += seconds

    # --- telling ---------------------------------------------------------------------------------------------

    def _settle_graphs(self) -> None:
        """Have captured steps counted that are not yet."""
        if self.graphs is not None:
            with self.lock:
                self.graphs.settle()

    def reset_stats(self) -> None:
        """Count from zero."""
        self._settle_graphs()
        self._passes = Passes()
        self._moe_steps = 0
        self._moe_s = 0.0
        self._dense_copied_before = 0 if self.dense is None else self.dense.bytes_copied
        for tier in self.tiers():
            tier.counters = TierCounters()
            tier.engine.reader.bytes_read = 0
            tier.engine.reader.retries = 0

    def stats(self) -> Statistics:
        """The figures so far."""
        self._settle_graphs()
        counters, passes, reader = self.tier.counters, self._passes, self.tier.engine.reader
        return Statistics(
            hits=counters.hits,
            misses=counters.misses,
            evictions=counters.evictions,
            bytes_read=reader.bytes_read,
            read_stall_s=counters.stall_s,
            read_retries=reader.retries,
            direct_io=reader.direct,
            moe_steps=self._moe_steps,
            moe_s=self._moe_s,
            prefill_tokens=passes.prefill_tokens,
            prefill_s=passes.prefill_s,
            decode_tokens=passes.decode_tokens,
            decode_s=passes.decode_s,
            slots=self.tier.table.usable_slots,
            slots_planned=self.plan.ram_slots,
            fused=dict(self.fused),
            policy=type(self.tier.policy).__name__,
            scheduler=scheduler_name(self.scheduler),
            **prefetch_figures(counters, self.observer.prefetcher),
            accelerator=self._accelerator_stats(),
            kv=None if self.paging is None else self.paging.statistics(),
            prefix=None if self.prefixes is None else replace(self.prefixes.statistics),
            graphs=None if self.graphs is None else deepcopy(self.graphs.figures),
        )

    def _accelerator_stats(self) -> AcceleratorStatistics | None:
        if self.accelerated is None:
            return None
        copied = 0 if self.dense is None else self.dense.bytes_copied - self._dense_copied_before
        return accelerator_statistics(self.accelerated.tiers.above, copied)

    def save_prefix(self, input_ids: torch.Tensor) -> Path:
        """Compute the KV cache of a token sequence and keep it on disk for prompts that begin with it.

        Args:
            input_ids: int64 [1, tokens].

        Returns:
            The file.

        Raises:
            UnsupportedOperationError: the model was loaded without `prefix_cache=`, or has layers that keep more
                than keys and values.
            InvalidArgumentError, DoesNotFitError, StorageError: see `Prefixes.save`.
        """
        if self.prefixes is None:
            raise UnsupportedOperationError('no prefixes are kept; load with prefix_cache=, such as "1GiB"')
        return self.prefixes.save(input_ids)

    def record_trace(self, name: str | None = None) -> None:
        """Keep the routing of all passes from now on; a trace that was being recorded is dropped.

        Args:
            name: of the trace; None for the model's.

        Raises:
            UnsupportedOperationError: a dense model, which routes nothing.
        """
        if not self.layers:
            raise UnsupportedOperationError(f"{self.plan.model} is a dense model: it has no routing to record")
        with self.lock:
            self.observer.recorder = TraceRecorder(self.plan.model if name is None else name, self.geometry)

    def trace(self) -> RoutingTrace:
        """The routing since `record_trace`, whole passes only; recording goes on.

        Raises:
            UnsupportedOperationError: nothing is being recorded.
        """
        with self.lock:
            if self.observer.recorder is None:
                raise UnsupportedOperationError("no trace is being recorded; call record_trace() before the run")
            return self.observer.recorder.trace()

    def report(self) -> Reconciliation:
        """What the plan predicted beside what was measured since `reset_stats`; renders itself in notebooks."""
        return reconcile(self.plan, self.stats(), None if self.memory is None else self.memory.until_now())

    def check(self) -> None:
        """Prove that every slot, key and read is accounted for; see `ExpertTier.check`."""
        with self.lock:
            (self.tier if self.accelerated is None else self.accelerated.tiers).check()
        if self.paging is not None:
            self.paging.check()

    def tiers(self) -> list[ExpertTier]:
        """The accelerator's first: its copies read what is in the host's."""
        return [self.tier] if self.accelerated is None else [self.accelerated.tiers.above, self.tier]

    # --- ending ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the readers, free the slots and keep what was learnt. May be called again."""
        with self.lock:
            if self._released:
                return
            self._settle_graphs()
            if not self.closed and self.learners and self._decoded:
                save_learnt(self.store, self.learners)
            self.closed = True
            self._end_waits()
            if self.graphs is not None:
                self.graphs.close()
            if self.dense is not None:
                self.dense.close()
            for tier in self.tiers():
                tier.engine.close()
                tier.release_memory()
            if self.paging is not None:
                self.paging.close()
            if self.accelerated is not None:
                self.accelerated.accelerator.release()
            self._released = True

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"the runtime of {self.plan.model} was closed; load the model again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedOperationError(
            "an offloaded model cannot be copied or pickled: its experts are in slots and on disk; load it again"
        )

    def __repr__(self) -> str:
        held = f"{self.tier.table.usable_slots} of {self.plan.expert_count} experts in RAM"
        state = "closed" if self.closed else held if self.layers else "a dense model"
        return f"<offload runtime of {self.plan.model}: {state}>"
