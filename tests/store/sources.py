"""A model's experts made of seeded bytes, and what the store's tests ask of every store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from formats.bundle import BundleLayout
from offload.store import ExpertGroup, ExpertStore, verify

IDENTITY = "0123456789abcdef" * 4

# One bundle of one block, one of several, one with biases and no gate; no two layers alike.
GROUPS = (
    ExpertGroup("model.layers.0.mlp.experts", 3, BundleLayout(16, 8, "bf16")),
    ExpertGroup("model.layers.1.mlp.experts", 4, BundleLayout(64, 96, "bf16", has_bias=True)),
    ExpertGroup("model.layers.3.feed_forward.experts", 2, BundleLayout(48, 80, "bf16", has_gate=False)),
)
# Shards of 64 KiB: the second layer's bundles of 40 KiB then lie one in a shard.
SHARD_NBYTES = 64 * 1024


class SeededSource:
    """Every bundle is random bytes of its own seed."""

    def __init__(
        self,
        groups: Sequence[ExpertGroup] = GROUPS,
        identity: str = IDENTITY,
        name: str = "Org/Tiny-MoE",
        on_fill: Callable[[], None] = lambda: None,
        on_check: Callable[[], None] = lambda: None,
    ) -> None:
        self.groups = groups
        self.identity = identity
        self.name = name
        self._on_fill = on_fill
        self._on_check = on_check

    def fill_bundle(self, group_index: int, expert: int, out: np.ndarray) -> None:
        self._on_fill()
        out[:] = self.bundle(group_index, expert)

    def check_unchanged(self) -> None:
        self._on_check()

    def bundle(self, group_index: int, expert: int) -> np.ndarray:
        seed = [int(self.identity[:8], 16), group_index, expert]
        return np.random.default_rng(seed).integers(0, 256, self.groups[group_index].layout.nbytes, dtype=np.uint8)


def experts(groups: Sequence[ExpertGroup]) -> list[tuple[int, int]]:
    return [(index, expert) for index, group in enumerate(groups) for expert in range(group.count)]


def read_bundle(store: ExpertStore, group_index: int, expert: int) -> np.ndarray:
    location = store.location(group_index, expert)
    fd = store.open_shard(location.shard, direct=False)
    try:
        return np.frombuffer(os.pread(fd, location.nbytes, location.offset), dtype=np.uint8)
    finally:
        os.close(fd)


def assert_whole(store: ExpertStore, source: SeededSource) -> None:
    """Every bundle is the source's, and every checksum right."""
    assert store.groups == tuple(source.groups)
    for group_index, expert in experts(source.groups):
        assert np.array_equal(read_bundle(store, group_index, expert), source.bundle(group_index, expert))
    assert verify(store) == []
