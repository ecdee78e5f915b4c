"""Which experts the forecast policy links, and the memory that deciding takes; no kernels, so planners may ask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_MOST_SOURCES = 256
"""Experts of other layers are sources of links as far as this goes: a layer's tables are read with every token."""

_LINK_NBYTES = 4

_EXPERT_NBYTES = 512
"""At most, of each expert: its rows of the policy's tables, and what its key costs in Python's sets and lists."""

_LAYER_NBYTES = 4096


def sources_of(counts: Sequence[int], layer: int) -> list[int]:
    """Whose experts say what follows in a layer's next visit: its own, those of the layer before and of the first.

    Args:
        counts: experts of each layer that has any.
        layer: place in `counts`.
    """
    chosen, experts = [layer], counts[layer]
    for source in sorted({max(layer - 1, 0), 0} - {layer}, reverse=True):
        experts += counts[source]
        if experts <= _MOST_SOURCES:
            chosen.append(source)
    return chosen


@lru_cache(maxsize=64)
def tables_nbytes(counts: tuple[int, ...]) -> int:
    """Bytes of the default policy for layers of so many experts; other policies take less."""
    links = sum(
        counts[layer] * sum(counts[source] for source in sources_of(counts, layer)) for layer in range(len(counts))
    )
    return _LINK_NBYTES * links + _EXPERT_NBYTES * sum(counts) + _LAYER_NBYTES * len(counts)
