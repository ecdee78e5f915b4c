"""Least recently used, over all layers together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from prefetch.policies.base import CachePolicy

MOST_ROUTED = 4096
"""Keys that were routed and are not in order yet, at most."""


class LruPolicy(CachePolicy):
    """Evicts the resident expert whose last routing is longest ago; inserting counts as use."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()
        # While nothing comes or goes nobody asks for the order: what was routed since is put in order then, or when it
        # is much. The order's entries lie all over memory, out of the caches at each token.
        self._routed: list[int] = []

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Moves the resident ones of `keys` to the recent end, in the order given; a prefill counts as any use."""
        self._routed += keys
        if len(self._routed) > MOST_ROUTED:
            self._settle()

    def _settle(self) -> None:
        order = self._order
        for key in self._routed:
            if key in order:
                order.move_to_end(key)
        self._routed.clear()

    def on_insert(self, key: int) -> None:
        """Makes `key` the most recent."""
        self._settle()
        self._order[key] = None
        self._order.move_to_end(key)

    def on_evict(self, key: int) -> None:
        """Forgets `key`."""
        self._settle()
        del self._order[key]

    def victim(self, pinned: Collection[int]) -> int | None:
        """The least recent key that is not pinned."""
        self._settle()
        for key in self._order:
            if key not in pinned:
                return key
        return None
