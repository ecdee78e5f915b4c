"""Where experts are during a step: tables that the accelerator and the doorbell's server read, and what is fetched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.doorbell_kernel import ELSEWHERE, NOWHERE
from offload.moe.layer import ExpertsLayer
from offload.tiers.accelerated import TierPair
from offload.tiers.slot_table import SlotState

_HERE = (SlotState.READY, SlotState.IN_USE)


class Homes:
    """Between steps the tables follow the tiers; in a step the one above stays as it is.

    Attributes:
        above: int64 [all experts] on the accelerator: the address of each one's bundle in its memory, 0 where it is not
            there.
    """

    def __init__(
        self,
        tiers: TierPair,
        layers: Sequence[ExpertsLayer],
        below: Sequence[npt.NDArray[np.int64]],
        device: torch.device,
    ) -> None:
        """All experts that are anywhere are new.

        Args:
            tiers: where experts are.
            layers: whose experts' keys follow one another.
            below: the server's `homes`.
            device: of the accelerator's tensors.
        """
        self._tiers = tiers
        self._layers = layers
        self._first = [layer.first_key for layer in layers]
        self._layer_of = [number for number, layer in enumerate(layers) for _ in range(layer.count)]
        self._below = below
        count = sum(layer.count for layer in layers)
        self._known = np.zeros(count, np.int64)
        self.above = torch.zeros(count, dtype=torch.int64, device=device)
        for homes in below:
            homes[:] = NOWHERE
        for table in (tiers.above.table, tiers.below.table):
            table.moved.update(table)
        self._fetched = 0

    def follow(self) -> None:
        """Before a step: take over what has moved."""
        tiers = self._tiers
        tiers.settle()
        upper, lower = tiers.above.table, tiers.below.table
        moved = upper.moved | lower.moved
        arrived = bool(upper.moved)
        upper.moved.clear()
        lower.moved.clear()
        for key in moved:
            here = upper.state_of(key) in _HERE
            self._known[key] = tiers.above.address(key) if here else 0
            self._place(key)
        if arrived:
            self.above.copy_(torch.from_numpy(self._known))

    def are_above(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """`is_above` of each."""
        above: npt.NDArray[np.bool_] = self._known[keys] != 0
        return above

    def is_above(self, key: int) -> bool:
        """Whether the step that runs, or was the last, has the expert on the accelerator."""
        return bool(self._known[key])

    def fetch(self, layer: int, routed: Sequence[int]) -> None:
        """Within a step: bring what a request needs of host memory there, all of it at once.

        Args:
            layer: whose request it is.
            routed: its experts, whether they are missing or not.

        Raises:
            StorageError, StoreCorruptError: an expert could not be read; both tiers are whole.
        """
        tiers, first = self._tiers, self._first[layer]
        keys = [first + expert for expert in routed if not self.is_above(first + expert)]
        # Copies ahead hold slots, and what is needed now comes first.
        tiers.end_copies()
        try:
            tiers.below.fetch(keys, self._count)
        except BaseException:
            tiers.abandon()
            raise
        lower = tiers.below.table
        for key in lower.moved:
            self._place(key)
        lower.moved.clear()

    def _count(self, _key: int) -> None:
        self._fetched += 1

    def take_fetched(self) -> int:
        """How many experts steps had to wait for since this was last asked."""
        fetched, self._fetched = self._fetched, 0
        return fetched

    def _place(self, key: int) -> None:
        """The server's word about one expert."""
        layer = self._layer_of[key]
        if self.is_above(key):
            home = ELSEWHERE
        elif self._tiers.below.table.state_of(key) in _HERE:
            home = self._tiers.below.address(key)
        else:
            home = NOWHERE
        self._below[layer][key - self._first[layer]] = home
