"""Which dense layers, KV caches and output layer to try in VRAM.

The choice is a knapsack whose weights are bytes. Layers of a kind are alike, so only how many of each matter: few
combinations are all tried. Where there are many, the parts are put in one after the other by seconds saved per byte,
and each number of parts is tried: the greedy solution of the knapsack, for every budget at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from placement.layer_kinds import LayerKind, layer_kinds
from placement.model_spec import ModelSpec

MOST_COMBINATIONS = 400


@dataclass(frozen=True)
class DenseChoice:
    """Layers in VRAM by kind.

    Attributes:
        dense: of each kind of layers, how many have their dense weights in VRAM.
        kv: how many of those have their KV cache there too.
        head: whether the output layer is.
    """

    dense: tuple[int, ...]
    kv: tuple[int, ...]
    head: bool

    def layers(self, kinds: Sequence[LayerKind]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(layers with dense weights in VRAM, layers with KV cache there), ascending; the first ones of each kind."""

        def first(counts: Sequence[int]) -> tuple[int, ...]:
            return tuple(sorted(i for kind, count in zip(kinds, counts, strict=True) for i in kind.indices[:count]))

        return first(self.dense), first(self.kv)


@dataclass(frozen=True)
class Saving:
    """What moving a part of a kind's layer, or the output layer, to VRAM saves.

    Attributes:
        kind: index of the kind; None for the output layer.
        kv: the KV cache too, or only the dense weights.
        seconds: of the workload that each saves; may be negative.
        nbytes: that each takes.
    """

    kind: int | None
    kv: bool
    seconds: float
    nbytes: int


def dense_choices(spec: ModelSpec, savings: Sequence[Saving]) -> list[DenseChoice]:
    """What to try, nothing in VRAM first; depends on nothing but the model and what is saved, never on a budget."""
    kinds = layer_kinds(spec)
    combinations = 2
    for kind in kinds:
        combinations *= (len(kind.indices) + 1) * (len(kind.indices) + 2) // 2
        if combinations > MOST_COMBINATIONS:
            return list(dict.fromkeys(_greedy(kinds, savings)))
    return list(_all(kinds))


def _all(kinds: Sequence[LayerKind]) -> Iterator[DenseChoice]:
    pairs = [[(d, v) for d in range(len(kind.indices) + 1) for v in range(d + 1)] for kind in kinds]
    for head in (False, True):
        for chosen in itertools.product(*pairs):
            yield DenseChoice(tuple(d for d, _ in chosen), tuple(v for _, v in chosen), head)


def _greedy(kinds: Sequence[LayerKind], savings: Sequence[Saving]) -> Iterator[DenseChoice]:
    dense, kv, head = [0] * len(kinds), [0] * len(kinds), False
    yield DenseChoice(tuple(dense), tuple(kv), head)
    ranked = sorted(savings, key=lambda one: (-one.seconds / max(one.nbytes, 1), one.nbytes))
    for one in ranked:
        if one.kind is None:
            head = True
            yield DenseChoice(tuple(dense), tuple(kv), head)
            continue
        count = len(kinds[one.kind].indices)
        for number in range(1, count + 1):
            dense[one.kind] = max(dense[one.kind], number)
            if one.kv:
                kv[one.kind] = number
            yield DenseChoice(tuple(dense), tuple(kv), head)
