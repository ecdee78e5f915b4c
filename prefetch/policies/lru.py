"""Least recently used, over all layers together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from prefetch.policies.base import CachePolicy


class LruPolicy(CachePolicy):
    """Evicts the resident expert whose last routing is longest ago; inserting counts as use."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Moves the resident ones of `keys` to the recent end, in the order given; a prefill counts as any use."""
        order = self._order
        for key in keys:
            if key in order:
                order.move_to_end(key)

    def on_insert(self, key: int) -> None:
        """Makes `key` the most recent."""
        self._order[key] = None
        self._order.move_to_end(key)

    def on_evict(self, key: int) -> None:
        """Forgets `key`."""
        del self._order[key]

    def victim(self, pinned: Collection[int]) -> int | None:
        """The least recent key that is not pinned."""
        for key in self._order:
            if key not in pinned:
                return key
        return None
