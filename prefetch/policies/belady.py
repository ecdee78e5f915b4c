"""Belady's optimum: evict what is needed again last (Belady 1966). Knows the future; a bound for the others."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence

from prefetch.policies.base import CachePolicy

NEVER = 1 << 62


class BeladyPolicy(CachePolicy):
    """Offline: it is given all routings beforehand and must then see exactly these, in order.

    With equal costs no policy misses less (experts of one step are all needed at once; those that are not yet computed
    are pinned by the tier).
    """

    def __init__(self, routes: Iterable[Sequence[int]]) -> None:
        """Note when each key is needed.

        Args:
            routes: the keys of each call of `on_route` to come.
        """
        self._uses: dict[int, list[int]] = {}
        self._step = 0
        for step, keys in enumerate(routes):
            for key in keys:
                self._uses.setdefault(key, []).append(step)
        for uses in self._uses.values():
            uses.reverse()
        self._next: dict[int, int] = {}
        # (-next use, key) of what is or was resident; an entry that says other than `_next` is out of date.
        self._heap: list[tuple[int, int]] = []

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """The next step of the future that was told.

        Raises:
            ValueError: a key was not foretold for this step.
        """
        for key in keys:
            uses = self._uses.get(key, [])
            if not uses or uses[-1] != self._step:
                raise ValueError(f"expert {key} in step {self._step} was not foretold")
            uses.pop()
            if key in self._next:
                self._note(key)
        self._step += 1

    def on_insert(self, key: int) -> None:
        """Notes when `key` is needed next."""
        self._note(key)

    def on_evict(self, key: int) -> None:
        """Forgets `key`."""
        del self._next[key]

    def victim(self, pinned: Collection[int]) -> int | None:
        """The key needed again last; of several that are never needed again the smallest."""
        found = self.victims(pinned, 1)
        return found[0] if found else None

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """See `CachePolicy.victims`."""
        found: list[int] = []
        looked_at: dict[int, tuple[int, int]] = {}
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            key = entry[1]
            if self._next.get(key) != -entry[0] or key in looked_at:
                continue
            looked_at[key] = entry
            if key not in pinned:
                found.append(key)
        for entry in looked_at.values():
            heapq.heappush(self._heap, entry)
        return found

    def _note(self, key: int) -> None:
        uses = self._uses.get(key)
        self._next[key] = uses[-1] if uses else NEVER
        heapq.heappush(self._heap, (-self._next[key], key))
