"""Experts in ascending order, in groups of what is there, while those ahead load."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Generator, Sequence

from offload.tiers.expert_tier import ExpertTier

_MOST_WHILE_LOADING = 4


def borrowed_in_order(
    tier: ExpertTier,
    keys: Sequence[int],
    shares: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    most: int = 0,
    begun: Callable[[], None] | None = None,
) -> Generator[list[int], bool | None]:
    """All of `keys` in turn, in groups borrowed until the next is asked for; as many as slots allow load meanwhile.

    Whoever sends True instead of asking keeps the group and gives it back by himself.

    Args:
        tier: where they are or come to be; has at least one slot that nothing else holds.
        keys: ascending.
        shares: see `ExpertTier.borrow`.
        sizes: of each of `keys`; None: one key is a group.
        most: sum of sizes of a group that has more than one; while experts load, a group has few, whose slots are soon
            free.
        begun: called once, when the first loads have begun for which there are slots.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read.
    """
    resident, waiting = tier.borrow(keys, shares)
    borrowed = set(resident)
    position = 0
    while position < len(keys):
        key = keys[position]
        started = tier.start_loads(waiting)
        if begun is not None:
            begun()
            begun = None
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
        group = next_group(keys, position, borrowed, sizes, most, _MOST_WHILE_LOADING if waiting else len(keys))
        position += len(group)
        kept = yield group
        borrowed.difference_update(group)
        if not kept:
            tier.give_back(group)


def next_group(
    keys: Sequence[int], first: int, borrowed: set[int], sizes: Sequence[int] | None, most: int, count: int
) -> list[int]:
    """keys[first], and those after it that are borrowed too, at most `count` and of at most `most` in all."""
    end = first + 1
    if sizes is not None:
        total = sizes[first]
        while end < min(len(keys), first + count) and keys[end] in borrowed and total + sizes[end] <= most:
            total += sizes[end]
            end += 1
    return list(keys[first:end])
