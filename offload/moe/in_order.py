"""Experts in ascending order, while those ahead load."""

from __future__ import annotations

from bisect import insort
from collections.abc import Generator, Sequence

from offload.tiers.expert_tier import ExpertTier


def borrowed_in_order(
    tier: ExpertTier, keys: Sequence[int], shares: Sequence[float] | None = None
) -> Generator[int, bool | None]:
    """Each of `keys` in turn, borrowed until the next one is asked for; as many as slots allow load meanwhile.

    Whoever sends True instead of asking keeps the expert and gives it back by himself.

    Args:
        tier: where they are or come to be; has at least one slot that nothing else holds.
        keys: ascending.
        shares: see `ExpertTier.borrow`.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read.
    """
    resident, waiting = tier.borrow(keys, shares)
    borrowed = set(resident)
    for key in keys:
        started = tier.start_loads(waiting)
        while key not in borrowed:
            if started or not borrowed:
                borrowed.update(tier.collect([key] if started else waiting))
                waiting = [other for other in waiting if other not in borrowed]
            else:
                # Every slot holds an expert of this step that comes later: the last of them makes room.
                last = max(borrowed)
                tier.discard_borrowed(last)
                borrowed.discard(last)
                insort(waiting, last)
            started = tier.start_loads(waiting)
        kept = yield key
        borrowed.discard(key)
        if not kept:
            tier.give_back([key])
