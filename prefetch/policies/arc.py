"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), with victims that may be refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from prefetch.policies.base import CachePolicy


class ArcPolicy(CachePolicy):
    """Two lists of resident keys, used once (T1) and used again (T2), and a memory of what left each (B1, B2).

    A key that is routed again moves to T2. A miss that B1 remembers makes the target size of T1 larger, one that B2
    remembers smaller. The victim is the oldest of T1 where T1 is above its target, else the oldest of T2; where all of
    one list are pinned, the other's.
    """

    def __init__(self) -> None:
        self.slots = 1
        self.target = 0.0
        self._once: OrderedDict[int, None] = OrderedDict()
        self._again: OrderedDict[int, None] = OrderedDict()
        self._left_once: OrderedDict[int, None] = OrderedDict()
        self._left_again: OrderedDict[int, None] = OrderedDict()
        self._returning: set[int] = set()

    def on_resize(self, slots: int) -> None:
        """The size that the paper calls c."""
        self.slots = max(1, slots)
        self.target = min(self.target, float(self.slots))
        self._forget()

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Hits move to T2; misses that are remembered move the target."""
        for key in keys:
            if key in self._again:
                self._again.move_to_end(key)
            elif key in self._once:
                del self._once[key]
                self._again[key] = None
            elif key in self._left_once:
                step = max(1.0, len(self._left_again) / len(self._left_once))
                self.target = min(float(self.slots), self.target + step)
                self._returning.add(key)
            elif key in self._left_again:
                step = max(1.0, len(self._left_once) / len(self._left_again))
                self.target = max(0.0, self.target - step)
                self._returning.add(key)

    def on_insert(self, key: int) -> None:
        """Into T2 where it is remembered and was asked for, else into T1; to insert a resident key changes nothing."""
        if key in self._once or key in self._again:
            return
        remembered = key in self._returning
        self._returning.discard(key)
        self._left_once.pop(key, None)
        self._left_again.pop(key, None)
        (self._again if remembered else self._once)[key] = None

    def on_evict(self, key: int) -> None:
        """Remembered from now on, as long as there is room for its name."""
        if key in self._once:
            del self._once[key]
            self._left_once[key] = None
        else:
            del self._again[key]
            self._left_again[key] = None
        self._forget()

    def _forget(self) -> None:
        """As in the paper, T1 and B1 hold at most c names, all lists together 2c."""
        while self._left_once and len(self._once) + len(self._left_once) > self.slots:
            self._returning.discard(self._left_once.popitem(last=False)[0])
        resident = len(self._once) + len(self._again)
        while self._left_again and resident + len(self._left_once) + len(self._left_again) > 2 * self.slots:
            self._returning.discard(self._left_again.popitem(last=False)[0])

    def victim(self, pinned: Collection[int]) -> int | None:
        """The oldest unpinned key of the list that is too long, or of the other."""
        lists = [self._once, self._again]
        if not self._once or len(self._once) <= self.target:
            lists.reverse()
        for keys in lists:
            for key in keys:
                if key not in pinned:
                    return key
        return None
