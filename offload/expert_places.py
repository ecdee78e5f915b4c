"""Where the bundle of each expert is: in the store, and in the host's tier."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from offload.devices.base import Span
from offload.moe.layer import ExpertsLayer
from offload.store.store import ExpertStore
from offload.tiers.transfer import ReadRequest


class ExpertPlaces:
    """From keys of experts, which count on from layer to layer, to reads.

    Args:
        layers: in the order of their keys.
        store: of the model, its layers in the same order.
        address_of: of a bundle that is in the host's tier; asked for copies to an accelerator alone.
    """

    def __init__(self, layers: Sequence[ExpertsLayer], store: ExpertStore, address_of: Callable[[int], int]) -> None:
        self._layers, self._store, self._address_of = tuple(layers), store, address_of
        self._first_keys = [layer.first_key for layer in layers]
        self._located: dict[int, tuple[int, int, int, str]] = {}

    def nbytes(self, key: int) -> int:
        """Bytes of an expert's bundle."""
        _, layer, _ = self._layer_of(key)
        return layer.layout.nbytes

    def in_store(self, key: int, out: Span) -> ReadRequest:
        """The read of an expert from disk."""
        known = self._located.get(key)
        if known is None:
            index, layer, expert = self._layer_of(key)
            location, checksum = self._store.location(index, expert), self._store.checksum(index, expert)
            label = f"expert {expert} of {layer.name}"
            known = self._located[key] = location.shard, location.offset, checksum, label
        shard, offset, checksum, label = known
        return ReadRequest(shard, offset, out, checksum, label)

    def in_ram(self, key: int, out: Span) -> ReadRequest:
        """The copy of an expert from the host's tier to an accelerator's."""
        index, layer, expert = self._layer_of(key)
        label = f"the copy of expert {expert} of {layer.name}"
        # A device's own memory is not read back: what was copied there was checked when it came from disk.
        checksum = self._store.checksum(index, expert) if isinstance(out, memoryview) else None
        return ReadRequest(0, self._address_of(key), out, checksum, label)

    def _layer_of(self, key: int) -> tuple[int, ExpertsLayer, int]:
        """(number of the layer, the layer, number of the expert in it)."""
        index = bisect_right(self._first_keys, key) - 1
        layer = self._layers[index]
        return index, layer, key - layer.first_key
