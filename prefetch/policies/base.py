"""The interface that every cache policy has.

An expert is an integer key (see `placement.model_spec.ModelSpec`: experts numbered through all layers). A policy
knows keys, never slots or bytes; it is told what happens and asked for victims. Calls come from one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence


class CachePolicy(ABC):
    """Decides what leaves a tier. Invariant: the resident keys are those inserted and not yet evicted."""

    @abstractmethod
    def on_route(self, keys: Sequence[int]) -> None:
        """A layer was routed: `keys` are the experts that it needs in this step, resident or not, each once."""

    @abstractmethod
    def on_insert(self, key: int) -> None:
        """`key` was given a slot."""

    @abstractmethod
    def on_evict(self, key: int) -> None:
        """`key` lost its slot."""

    @abstractmethod
    def victim(self, pinned: Collection[int]) -> int | None:
        """The resident key to evict next, or None when all resident keys are in `pinned`.

        Does not evict: `on_evict` follows if the caller does.
        """
