"""Caches as a tape sees them: buffers with room that its rows write to and attend, or blocks that are attended between
its rows.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from offload.hf.fused.kv_cache import Followed, Form, GrowingLayer, Room
from offload.hf.paged.layer import PagedLayer
from offload.kv.attention import attend_few
from offload.kv.table import BlockTable

if TYPE_CHECKING:
    from offload.hf.fused.stack_tape import StackTape


_KEPT = "_offload_rooms"
"""Where a cache keeps what a tape knows of it: it goes when the cache goes, and copies do not have it."""


class TapeCache(ABC):
    """A cache that a tape can write the next token of each sequence to.

    Attributes:
        batch: sequences.
        past: tokens of each sequence that are there.
    """

    batch: int
    past: int

    @abstractmethod
    def give_to(self, tape: StackTape) -> None:
        """Let a tape that is about to be played write to this cache and attend to it."""

    def took_one(self) -> None:  # noqa: B027 - blocks have the token when it is written
        """The tape has been played."""


def tape_cache(cache: DynamicCache, form: Form, tape: StackTape | None = None) -> TapeCache | None:
    """A cache with room for one token more of each sequence in every layer, all of one length; None for another.

    Args:
        cache: the cache.
        form: of what the next token adds to each layer.
        tape: that will be played; what it knows of the cache it wrote to last is not looked for again.
    """
    known: _Rooms | None = cache.__dict__.get(_KEPT)
    if known is not None and tape is not None and known.go_on(cache, tape):
        return known
    if all(type(layer) is GrowingLayer for layer in cache.layers):
        return _growing(cache, form)
    if all(type(layer) is PagedLayer for layer in cache.layers):
        return _paged(cache, form)
    return None


class _Rooms(TapeCache):
    """Layers that grow in place, with the room that each has for tokens to come."""

    def __init__(self, cache: DynamicCache, rooms: list[Room], form: Form) -> None:
        """Begin.

        Args:
            cache: all of its layers are `GrowingLayer`s.
            rooms: of each.
            form: that they were asked for.
        """
        self.batch, self.past = form[0], rooms[0].past
        self._cache = weakref.ref(cache)
        self._layers: list[GrowingLayer] = list(cache.layers)  # type: ignore[arg-type]  # as the caller has seen
        self._rooms, self._form = rooms, form
        self._tokens = min(room.tokens for room in rooms)
        self._followed: Followed | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def go_on(self, cache: DynamicCache, tape: StackTape) -> bool:
        """Whether the tape wrote here last, nothing was done to the layers since, and there is room for one token."""
        if self._followed is None or tape.rooms is not self._rooms:
            return False
        past: int = self._layers[0].__dict__["_written"]
        if past >= self._tokens or not self._followed.are_as_left(cache.layers, past):
            return False
        self.past = past
        return True

    def give_to(self, tape: StackTape) -> None:
        if tape.rooms is not self._rooms:
            self._followed = None
            tape.take_rooms(self._rooms)
        tape.take_position(self.past)

    def took_one(self) -> None:
        if self._followed is not None:
            self._followed.wrote_one(self.past)
            return
        for layer, room in zip(self._layers, self._rooms, strict=True):
            layer.took_one(room, self._form)
        self._followed = Followed(self._layers)
        cache = self._cache()
        if cache is not None:
            cache.__dict__[_KEPT] = self


def _growing(cache: DynamicCache, form: Form) -> TapeCache | None:
    layers: list[GrowingLayer] = cache.layers  # type: ignore[assignment]  # as the caller has seen
    rooms: list[Room] = []
    for layer in layers:
        room = layer.room_for_one(form)
        if room is None or (rooms and room.past != rooms[0].past):
            return None
        rooms.append(room)
    return _Rooms(cache, rooms, form)


class _Paged(TapeCache):
    def __init__(self, layers: list[PagedLayer], tables: list[BlockTable], batch: int) -> None:
        self.batch, self.past = batch, tables[0].length
        self._paging, self._tables = layers[0].paging, tables
        self._tape: StackTape | None = None

    def give_to(self, tape: StackTape) -> None:
        self._tape = tape
        tape.attend_by(self._attend)

    def took_one(self) -> None:
        assert self._tape is not None
        self._tape.let_go()

    def _attend(
        self, index: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        table = self._tables[index]
        table.append(keys, values)
        self._paging.note_paged()
        return attend_few(table, query, scale)


def _paged(cache: DynamicCache, form: Form) -> TapeCache | None:
    layers: list[PagedLayer] = cache.layers  # type: ignore[assignment]  # as the caller has seen
    batch, heads, width, dtype = form
    tables: list[BlockTable] = []
    for layer in layers:
        table = layer.table
        if table is None or layer.dtype is not dtype or layer.paging is not layers[0].paging:
            return None
        plain = table.layouts.plain
        if (
            table.sequences != batch
            or (plain.kv_heads, plain.key_width, plain.value_width) != (heads, width, width)
            or (tables and table.length != tables[0].length)
        ):
            return None
        tables.append(table)
    return _Paged(layers, tables, batch)
