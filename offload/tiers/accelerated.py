"""Two tiers, one above the other: an accelerator's slots, filled over a link from the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from offload.tiers.expert_tier import ExpertTier
from offload.tiers.slot_table import SlotState
from offload.tiers.transfer import Urgency


@dataclass(frozen=True)
class TierPair:
    """Where a step finds experts.

    Invariant: an expert that is being copied is in use below, so that its bytes stay where they are until the copy is
    done. Between steps nothing else is in use.

    Attributes:
        above: the accelerator's tier; its engine copies.
        below: the host's tier; its engine reads from disk.
    """

    above: ExpertTier
    below: ExpertTier
    # In use below because they are being copied, and for nothing else.
    _held: set[int] = field(default_factory=set)

    def borrow(
        self, keys: Sequence[int], shares: Sequence[float] | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Split a layer's routed experts: in use above, in use below, missing from both.

        One whose copy ahead is still on its way is in use below: it can be computed there, or its copy waited for.

        Args:
            keys: the experts, each once.
            shares: see `CachePolicy.on_route`; those of `keys`.
        """
        self.settle()
        cached, rest = self.above.borrow(keys, shares)
        for key in self._held.intersection(rest):
            self._let_go(key)
        if shares is not None:
            share_of = dict(zip(keys, shares, strict=True))
            shares = [share_of[key] for key in rest]
        resident, missing = self.below.borrow(rest, shares)
        return cached, resident, missing

    def give_back(self, keys: Iterable[int]) -> None:
        """End the step's use of experts below; those that are being copied stay in use until that is done."""
        for key in keys:
            self._held.add(key)
            if not self.above.is_loading(key):
                self._let_go(key)

    def start_copy(self, key: int, beside: Sequence[int]) -> bool:
        """Begin to copy an expert that is borrowed below; False where the accelerator has no slot to spare.

        Args:
            key: the expert.
            beside: others of this step whose copies have begun; they keep their slots.
        """
        return self.above.start_loads([*beside, key]) > len(beside)

    # --- ahead -----------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """How many experts below are in use only because they are being copied."""
        return len(self._held)

    def copy_ahead(self, key: int) -> bool:
        """Begin to copy an expert for a later layer; False where it is not idle below, or no slot above is to spare."""
        if not self.can_be_copied(key):
            return False
        return self.copy_all_ahead([key]) == 1

    def can_be_copied(self, key: int) -> bool:
        """Whether an expert is idle below, and neither above nor on its way."""
        return self.below.table.state_of(key) is SlotState.READY and self.above.table.slot_of(key) is None

    def copy_all_ahead(self, keys: Sequence[int]) -> int:
        """Begin to copy experts that can be copied, in order, until slots above run out; how many."""
        self.below.poll(keys)
        self._held.update(keys)
        begun = self.above.start_loads(keys, Urgency.SOON)
        for key in keys[begun:]:
            self._let_go(key)
        return begun

    def settle(self) -> None:
        """Give back below what is not being copied any more."""
        for key in [key for key in self._held if not self.above.is_loading(key)]:
            self._let_go(key)

    def end_copies(self) -> None:
        """Cancel copies ahead; returns when nothing reads what is below. For when the step itself copies nothing."""
        self.above.end_reads()
        self.settle()

    def _let_go(self, key: int) -> None:
        self._held.discard(key)
        self.below.give_back([key])

    # --- all of them -----------------------------------------------------------------------------------------

    def preload(self, keys: Iterable[int], arrived: Callable[[int], None]) -> None:
        """Fill the accelerator's slots with `keys`, one after the other, by way of the host's.

        Args:
            keys: no more than there are slots.
            arrived: told each one when it is here.

        Raises:
            StorageError, StoreCorruptError: an expert could not be read; both tiers are as after `abandon`.
        """
        try:
            for key in keys:
                self.below.fetch([key], lambda _key: None)
                self.below.poll([key])
                self.above.start_loads([key])
                while not (here := self.above.collect([key])):
                    self.above.start_loads([key])
                self.above.give_back(here)
                self.below.give_back([key])
                arrived(key)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """After a failure or an interrupt: copies end first, because they read what is below."""
        self.above.abandon()
        self.below.abandon()
        self._held.clear()

    def check(self) -> None:
        """Prove that both tiers are consistent, between steps; see `ExpertTier.check`."""
        self.above.check()
        self.below.check()
        in_use = {key for key in self.below.table if self.below.table.state_of(key) is SlotState.IN_USE}
        if in_use != self._held:
            raise AssertionError(f"in use below {sorted(in_use)}, held for copies {sorted(self._held)}")
        copied = {key for key in self.above.table if self.above.table.state_of(key) is SlotState.LOADING}
        if not copied <= self._held:
            raise AssertionError(f"copied are {sorted(copied)}, but held below {sorted(self._held)}")
