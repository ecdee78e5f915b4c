"""A tier of experts: slots, what lies in them, and the reads that fill them.

The MoE step borrows experts: `borrow` takes what is resident, `start_loads` fetches what is not, `collect` hands
over what has arrived, `give_back` lets go. A borrowed or loading expert is never evicted. When any of these fails or
is interrupted, `abandon` makes the tier whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from offload.devices.base import Span
from offload.tiers.arena import Arena
from offload.tiers.counters import TierCounters
from offload.tiers.slot_table import SlotState, SlotTable
from offload.tiers.transfer import Completion, Engine, ReadRequest, Urgency
from prefetch.policies.base import CachePolicy

Locate = Callable[[int, Span], ReadRequest]
"""(expert key, slot memory) → the read that fills the slot's first bytes."""


class ExpertTier:
    """One tier's experts. One thread at a time; reader threads only finish tickets."""

    def __init__(
        self, arena: Arena, policy: CachePolicy, engine: Engine, locate: Locate, bundle_nbytes: Callable[[int], int]
    ) -> None:
        """Make an empty tier.

        Args:
            arena: the slots.
            policy: who is evicted.
            engine: fills slots.
            locate: where an expert's bytes are.
            bundle_nbytes: bytes of an expert, at most a slot.
        """
        self.arena = arena
        self.policy = policy
        self.engine = engine
        self.table = SlotTable(arena.count)
        self.counters = TierCounters()
        self._locate = locate
        self._bundle_nbytes = bundle_nbytes
        self._tickets: dict[int, Completion] = {}
        self._all: npt.NDArray[np.int64] | None = None
        self._all_version = -1
        # Read ahead and not routed since; routed before they arrived.
        self._ahead: set[int] = set()
        self._late: set[int] = set()
        policy.on_resize(arena.count)

    # --- borrowing -------------------------------------------------------------------------------------------

    def borrow(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> tuple[list[int], list[int]]:
        """Split a layer's routed experts into resident ones, which are now in use, and missing ones.

        Args:
            keys: the experts, each once.
            shares: at prefill, the share of tokens of each; see `CachePolicy.on_route`.
        """
        self.policy.on_route(keys, shares)
        resident, missing = self._take(keys)
        if self._ahead:
            self._note_asked(resident, missing)
        self.counters.hits += len(resident)
        self.counters.misses += len(missing)
        return resident, missing

    def _take(self, keys: Sequence[int]) -> tuple[list[int], list[int]]:
        if self._tickets:
            for key in keys:
                # A read ahead that failed is a miss: it is read again, and that error is carried.
                self._settle(key, carry_error=False)
        return self.table.acquire(keys)

    def _note_asked(self, resident: Iterable[int], missing: Iterable[int]) -> None:
        used, late = self._ahead.intersection(resident), self._ahead.intersection(missing)
        self.counters.ahead_used += len(used)
        self.counters.ahead_late += len(late)
        self._late |= late
        self._ahead -= used | late

    def holds(self, key: int) -> bool:
        """Whether an expert is here, in use or not."""
        self._settle(key, carry_error=False)
        return self.table.state_of(key) in (SlotState.READY, SlotState.IN_USE)

    def has_slots_for(self, keys: Iterable[int]) -> bool:
        """Whether each of `keys` has a slot, in which it lies or into which it is being read."""
        return all(self.table.slot_of(key) is not None for key in keys)

    def address(self, key: int) -> int:
        """Address of a borrowed expert's bundle."""
        return self.arena.address(self.slot(key))

    def addresses(self, keys: Iterable[int]) -> npt.NDArray[np.intp]:
        """Addresses of borrowed experts' bundles, intp [keys]."""
        return np.array([self.address(key) for key in keys], np.intp)

    def slot(self, key: int) -> int:
        """Slot of a borrowed expert."""
        slot = self.table.slot_of(key)
        if slot is None:
            raise KeyError(key)
        return slot

    def addresses_of_all(self, count: int) -> npt.NDArray[np.int64] | None:
        """Addresses of experts 0 to `count`, exclusively, if all are ready; the same array as long as none moves."""
        if self._all_version != self.table.version:
            ready = len(self.table) >= count and all(
                self.table.state_of(key) is SlotState.READY for key in range(count)
            )
            self._all = self.addresses(range(count)).astype(np.int64, copy=False) if ready else None
            self._all_version = self.table.version
        return self._all

    def note_hits(self, layers: Sequence[Sequence[int]]) -> None:
        """Count experts of some layers as routed to and found, where somebody used them without borrowing."""
        for keys in layers:
            self.policy.on_route(keys)
        self.counters.hits += sum(map(len, layers))

    def give_back(self, keys: Collection[int]) -> None:
        """End the use of borrowed experts; they stay resident until the policy evicts them."""
        self.table.release(keys)

    def discard_borrowed(self, key: int) -> None:
        """Give a borrowed expert back and evict it at once: its slot is needed sooner than it is."""
        self.table.release([key])
        self._evict(key)

    # --- loading ---------------------------------------------------------------------------------------------

    def settle_arrived(self) -> None:
        """Have reads that ended known as such: what was read ahead holds its slot no longer than others do."""
        for key in [key for key, ticket in self._tickets.items() if ticket.finished]:
            self._settle(key, carry_error=False)

    def start_loads(
        self, keys: Sequence[int], urgency: Urgency = Urgency.NOW, victims: Iterable[int] | None = None
    ) -> int:
        """Begin to read experts, in order, until slots run out.

        Args:
            keys: the experts.
            urgency: how soon they are needed.
            victims: whom to evict where no slot is free, in this order; None: whom the policy names.

        Returns:
            How many of `keys`, from the first, are now loading or loaded.

        Raises:
            ClosedError: the engine was closed.
        """
        if not keys:
            return 0
        leaving: Iterator[int] | None = None if victims is None else iter(victims)
        if leaving is None:
            for ahead in self._tickets.keys() - set(keys):
                # A read ahead that is done holds its slot no longer than others do.
                self._settle(ahead, carry_error=False)
        for started, key in enumerate(keys):
            ticket = self._tickets.get(key)
            if ticket is not None:
                if urgency is Urgency.NOW:
                    self.engine.promote(ticket)
                continue
            if self.table.slot_of(key) is not None:
                continue
            if not self.table.free_slots:
                if leaving is None:
                    held = self.table.pinned.union(keys)
                    leaving = iter(self.policy.victims(held, len(keys) - started))
                victim = next(leaving, None)
                if victim is None:
                    return started
                self._evict(victim)
            self._start_load(key, urgency)
        return len(keys)

    def _start_load(self, key: int, urgency: Urgency) -> None:
        # At no moment does the table hold a key that the policy does not know: such a slot would never be free again.
        self.policy.on_insert(key)
        slot = self.table.begin_load(key)
        out = self.arena.span(slot, self._bundle_nbytes(key))
        self._tickets[key] = self.engine.submit(self._locate(key, out), urgency)
        if urgency is Urgency.SOON:
            self._ahead.add(key)
            self.counters.ahead_issued += 1

    @property
    def reading_ahead(self) -> list[int]:
        """Experts that are read ahead, have not arrived and were not routed since."""
        return [key for key in self._ahead if key in self._tickets]

    @property
    def waiting_ahead(self) -> list[int]:
        """Of `reading_ahead`, those of which no reader has begun a part."""
        return [key for key in self.reading_ahead if not self._tickets[key].begun]

    @property
    def loading(self) -> int:
        """Loads that have been started and not been noticed to have ended."""
        return len(self._tickets)

    def is_loading(self, key: int) -> bool:
        """Whether bytes of `key` may still arrive; a load that failed, and that nobody waits for, is forgotten."""
        self._settle(key, carry_error=False)
        return key in self._tickets

    def end_reads(self) -> None:
        """Cancel reads ahead and return when nothing is on its way any more. Between steps."""
        self.cancel_ahead(self._ahead)
        self.engine.wait_all(self._tickets.values())
        for key in list(self._tickets):
            self._settle(key, carry_error=False)

    def cancel_ahead(self, keys: Iterable[int]) -> None:
        """Stop reading ahead those of `keys` that have not arrived; what a reader has begun it finishes first."""
        for key in list(keys):
            ticket = self._tickets.get(key)
            if ticket is not None and key in self._ahead:
                self.engine.cancel(ticket)
                self._settle(key, carry_error=False)

    def collect(self, keys: Sequence[int]) -> list[int]:
        """Wait until at least one of `keys` has arrived; all that have are now in use.

        When none of them is loading, waits for any read of the tier: others may hold all slots. May return nothing:
        ask `start_loads` again.

        Raises:
            StorageError, StoreCorruptError: a read of one of them failed; its slot is free again.
        """
        tickets = [self._tickets[key] for key in keys if key in self._tickets] or list(self._tickets.values())
        if tickets and not any(ticket.finished for ticket in tickets):
            late = self._late.issuperset(keys) if self._late else False
            before = perf_counter()
            self.engine.wait_any(tickets)
            seconds = perf_counter() - before
            self.counters.stall_s += seconds
            if late:
                self.counters.late_stall_s += seconds
        return self.poll(keys)

    def poll(self, keys: Sequence[int]) -> list[int]:
        """Those of `keys` that have arrived, which are now in use; waits for nothing.

        Raises:
            StorageError, StoreCorruptError: as `collect`.
        """
        for key in keys:
            self._settle(key)
        arrived, _ = self.table.acquire(keys)
        if self._late:
            self._late.difference_update(arrived)
        return arrived

    def fetch(self, keys: Sequence[int], arrived: Callable[[int], None]) -> None:
        """Make `keys` resident and return when they are; there must be slots for all of them.

        Args:
            keys: experts to read, unless they are here.
            arrived: told each one when it is here.

        Raises:
            StorageError, StoreCorruptError: a read failed; the tier is as after `abandon`.
        """
        try:
            here, missing = self._take(keys)
            self.start_loads(missing)
            for key in missing:
                while not self.collect([key]):
                    if not self.start_loads([key]):
                        raise RuntimeError(f"expert {key} is to be fetched, but the slots are taken")
                here.append(key)
                arrived(key)
            self.give_back(here)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """After a failure or an interrupt anywhere in a step: nothing is in use, and no read writes any more.

        Experts that are here stay; all reads are cancelled, those ahead too.
        """
        self.engine.cancel_all()
        self.table.recover([key for key, ticket in self._tickets.items() if ticket.succeeded])
        self._tickets.clear()
        here = set(self.table)
        self._late.clear()
        self.counters.ahead_wasted += len(self._ahead - here)
        self._ahead &= here
        while (lost := self.policy.victim(here)) is not None:
            self.policy.on_evict(lost)

    def _settle(self, key: int, *, carry_error: bool = True) -> None:
        """Bring the table up to date with a finished read."""
        ticket = self._tickets.get(key)
        if ticket is None or not ticket.finished:
            return
        del self._tickets[key]
        if ticket.succeeded:
            self.table.finish_load(key)
            self.counters.loads += 1
            return
        self._drop(key)
        if ticket.error is not None and carry_error:
            raise ticket.error

    # --- leaving ---------------------------------------------------------------------------------------------

    def evict(self, key: int) -> None:
        """Free the slot of an expert that is here and not in use."""
        self._settle(key, carry_error=False)
        self._evict(key)

    def _evict(self, key: int) -> None:
        self._drop(key)
        self.counters.evictions += 1

    def _drop(self, key: int) -> None:
        self.table.evict(key)
        self.policy.on_evict(key)
        if key in self._ahead:
            self._ahead.discard(key)
            self.counters.ahead_wasted += 1

    def resize(self, slots: int) -> None:
        """Use at most `slots` slots from now on (at least one); memory of the others goes back to the system.

        Experts in use keep theirs: call it between steps. Reads ahead end where slots go.
        """
        if slots < self.table.usable_slots:
            self.end_reads()
        for key in list(self._tickets):
            self._settle(key, carry_error=False)
        target = max(1, min(slots, self.arena.count))
        while self.table.usable_slots > target:
            if not self.table.free_slots:
                victim = self.policy.victim(self.table.pinned)
                if victim is None:
                    break
                self._evict(victim)
            self.arena.discard(self.table.retire())
        while self.table.usable_slots < target:
            self.table.restore()
        self.policy.on_resize(self.table.usable_slots)

    def give_up_slab(self) -> int:
        """Between steps: give the memory of one slab back for good, and evict what lies there.

        Returns:
            How many slots went; 0 where the last slab is left, which stays.
        """
        self.engine.wait_all(self._tickets.values())
        for key in list(self._tickets):
            self._settle(key, carry_error=False)
        slots = self.arena.slots_beside(self.table.last_usable())
        if len(slots) >= self.table.usable_slots:
            return 0
        for slot in slots:
            owner = self.table.key_of(slot)
            if owner is not None:
                self._evict(owner)
            self.table.retire(slot)
        self.arena.discard_slab(slots[0])
        self.policy.on_resize(self.table.usable_slots)
        return len(slots)

    def release_memory(self) -> None:
        """After the engine was closed: no expert is here any more, and all slots' memory is given back."""
        self.abandon()
        for key in list(self.table):
            self._drop(key)
        self.arena.discard_all()

    def check(self) -> None:
        """Prove that slots, keys, reads and the policy agree; see `SlotTable.check`."""
        self.table.check()
        loading = {key for key in self.table if self.table.state_of(key) is SlotState.LOADING}
        if loading != set(self._tickets):
            raise AssertionError(f"loading {sorted(loading)} but tickets for {sorted(self._tickets)}")
        if not self._ahead <= set(self.table):
            raise AssertionError(f"read ahead {sorted(self._ahead)} but slots for {sorted(self.table)}")
        known: set[int] = set()
        while (key := self.policy.victim(known)) is not None:
            known.add(key)
        if known != set(self.table):
            raise AssertionError(f"slots for {sorted(self.table)} but the policy knows {sorted(known)}")
