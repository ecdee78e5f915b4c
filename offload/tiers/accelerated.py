"""Two tiers, one above the other: an accelerator's slots, filled over a link from the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from offload.tiers.expert_tier import ExpertTier


@dataclass(frozen=True)
class TierPair:
    """Where a step finds experts.

    Invariant between steps: nothing of either tier is in use. Within a step: an expert that is being copied is in use
    below, so that its bytes stay where they are until the copy is done.

    Attributes:
        above: the accelerator's tier; its engine copies.
        below: the host's tier; its engine reads from disk.
    """

    above: ExpertTier
    below: ExpertTier

    def start_copy(self, key: int, beside: Sequence[int]) -> bool:
        """Begin to copy an expert that is borrowed below; False where the accelerator has no slot to spare.

        Args:
            key: the expert.
            beside: others of this step whose copies have begun; they keep their slots.
        """
        return self.above.start_loads([*beside, key]) > len(beside)

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

    def check(self) -> None:
        """Prove that both tiers are consistent; see `ExpertTier.check`."""
        self.above.check()
        self.below.check()
