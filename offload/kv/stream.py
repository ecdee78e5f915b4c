"""The order in which a layer's history passes: what is on disk is read while the rest is attended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from formats.kv import KvLayout
from offload.kv.pool import BlockPool
from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Made = TypeVar("Made")


class Segment(NamedTuple):
    """Consecutive blocks of every sequence, attended in one piece wherever they are.

    Attributes:
        first: column.
        end: column after the last.
        layout: of the blocks.
    """

    first: int
    end: int
    layout: KvLayout


class Unit(NamedTuple):
    """A segment of one sequence.

    Attributes:
        segment: its number.
        row: the sequence.
        blocks: int64, numbers.
    """

    segment: int
    row: int
    blocks: Int64


def segments(table: BlockTable, columns: int, first: int = 0, step: int | None = None) -> list[Segment]:
    """Columns of a table from `first` to `columns`. Where they are cut depends on nothing but the number of tokens.

    Args:
        table: see above.
        columns: see above.
        first: see above.
        step: columns of a segment; None for those of the settings.
    """
    step = table.settings.segment_blocks if step is None else step
    packed = max(first, min(table.sealed, columns)) if table.layouts.packed is not None else first
    cuts = [*range(first, packed, step), *range(packed, columns, step), columns]
    return [Segment(first, end, table.layout_of(first)) for first, end in pairwise(cuts)]


class Tiers(NamedTuple):
    """In which memory the blocks of segments are, each bool [sequences, segments].

    Attributes:
        above: all of them in an accelerator's.
        below: all in the host's.
        apart: on disk, some of them at least, or some above and some below: brought together in host memory one segment
            after the other.
    """

    above: Bool
    below: Bool
    apart: Bool


def tiers_of(table: BlockTable, cut: list[Segment]) -> Tiers:
    """Where segments of a table are."""
    if not cut:
        nothing = np.zeros((table.sequences, 0), np.bool_)
        return Tiers(nothing, nothing, nothing)
    pool, first = table.pool, cut[0].first
    blocks = table.all_blocks(cut[-1].end)[:, first:]
    starts = [segment.first - first for segment in cut]
    cold, high = pool.addresses[blocks] == 0, pool.is_above[blocks]
    above = np.logical_and.reduceat(high, starts, axis=1)
    below = ~np.logical_or.reduceat(cold | high, starts, axis=1)
    return Tiers(above, below, ~(above | below))


def units_of(table: BlockTable, cut: list[Segment], which: Bool) -> list[Unit]:
    """Those segments of sequences for which `which` [sequences, segments] is true, sequence after sequence."""
    return [
        Unit(int(index), int(row), table.blocks(int(row), cut[index].first, cut[index].end))
        for row, index in zip(*np.nonzero(which), strict=True)
    ]


class ColdUnits:
    """Units that have to be brought together in host memory, in the order in which they will be asked for.

    Attributes:
        units: see above.
        keys: what names each while it is staged.
        names: all keys.
    """

    def __init__(self, pool: BlockPool, units: list[Unit]) -> None:
        """As long as no block comes, goes or moves. The caller holds the pool's lock."""
        self.units: Sequence[Unit] = units
        self.keys: Sequence[bytes] = [pool.key(unit.blocks) for unit in units]
        self.names = frozenset(self.keys)

    @classmethod
    def made_when_asked(cls, pool: BlockPool, count: int, unit: Callable[[int], Unit]) -> ColdUnits:
        """So many units that were not asked for before; nothing is kept of them.

        Args:
            pool: whose blocks.
            count: how many.
            unit: the one of a number.
        """
        made = cls(pool, [])
        made.units = _Made(count, unit)
        made.keys = _Made(count, lambda number: pool.key(unit(number).blocks))
        return made


class _Made(Sequence[Made]):
    """What a function makes of each number, whenever it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Made]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: Any) -> Any:
        return [self._make(number) for number in self._numbers[at]] if isinstance(at, slice) else self._make(at)


class Stream:
    """Brings units together in host memory in the order in which they will be asked for, from disk and from above.

    The caller holds the pool's lock.
    """

    def __init__(self, table: BlockTable, cold: ColdUnits) -> None:
        """Begin with the first ones; what was read ahead for anything else is forgotten."""
        self._pool = table.pool
        self._follower = table.follower
        self._units, self._keys = cold.units, cold.keys
        self._next = 0
        self._done = 0
        # Half of what is read ahead, so that reads go on while it is attended.
        self._most = max(1, table.settings.staging_segments // 2)
        self._pool.staging.drop_all(but=cold.names)
        self._fill()

    @contextmanager
    def take(self) -> Iterator[Int64]:
        """Within it, the addresses of the next unit's blocks.

        Raises:
            StorageError, StoreCorruptError: they cannot be read.
        """
        with self.take_some(1) as (_, addresses):
            yield addresses

    @contextmanager
    def take_some(self, most: int) -> Iterator[tuple[Sequence[Unit], Int64]]:
        """Within it, the next unit and those after it that have arrived by then, and the addresses of their blocks.

        Args:
            most: units, at most.

        Raises:
            StorageError, StoreCorruptError: they cannot be read.
        """
        first = self._done
        self._done += 1
        key, unit = self._keys[first], self._units[first]
        if not self._pool.start(key, unit.blocks):
            # Buffers hold what comes later: the same blocks came up before, for another sequence.
            self._pool.staging.drop_all()
            self._pool.start(key, unit.blocks)
        try:
            addresses = [self._pool.fetch(key, unit.blocks)]
            while self._done < first + most and self._has_next and self._next_needs_no_room():
                self._done += 1
                addresses.append(self._pool.fetch(self._keys[self._done - 1], self._units[self._done - 1].blocks))
            yield self._units[first : self._done], np.concatenate(addresses)
        finally:
            for key in set(self._keys[first : self._done]) - set(self._keys[self._done : self._done + 1]):
                self._pool.drop(key)
        self._fill()

    def pass_on(
        self, alike: Callable[[Sequence[Unit]], int], attend: Callable[[Sequence[Unit], Int64], None], *, waits: bool
    ) -> None:  # fmt: skip
        """Let the units that are left be attended, some at a time.

        Args:
            alike: how many of some units, from the first on, can be attended together.
            attend: called with them and the addresses of their blocks.
            waits: for all; False to end before the first that has not come: what was read ahead has its room until it
                is attended, so that reads go on beside the rest.

        Raises:
            StorageError, StoreCorruptError: they cannot be read.
        """
        while self._done < len(self._units) and (waits or self._has_next):
            with self.take_some(alike(self._units[self._done : self._done + self._most])) as taken:
                attend(*taken)

    @property
    def _has_next(self) -> bool:
        """Whether the next unit need not be waited for."""
        return self._done < len(self._units) and self._pool.staging.has_arrived(self._keys[self._done])

    def _next_needs_no_room(self) -> bool:
        """A unit with blocks above needs room, which the one before it may hold."""
        above = self._pool.is_above
        return not any(above[unit.blocks].any() for unit in self._units[self._done - 1 : self._done + 1])

    def _fill(self) -> None:
        while self._next < len(self._units) and self._pool.start(
            self._keys[self._next], self._units[self._next].blocks
        ):
            self._next += 1

    def look_ahead(self) -> None:
        """Begin to read what the next table will ask for first."""
        if self._next == len(self._units):
            read_ahead(None if self._follower is None else self._follower(), self._pool)


def read_ahead(table: BlockTable | None, pool: BlockPool) -> None:
    """Begin to read a table's first units from disk, as far as there is room. The caller holds the pool's lock."""
    if table is None or table.pool is not pool:
        return
    for unit, key in _asked_for(table):
        if not pool.start(key, unit.blocks):
            return


def _asked_for(table: BlockTable) -> Iterator[tuple[Unit, bytes]]:
    """What a table will ask for, with names."""
    known = table.few_tokens
    if known is not None and known.holds and known.is_current(table):
        yield from zip(known.cold.units, known.cold.keys, strict=True)
        return
    cut = segments(table, table.columns)
    for unit in units_of(table, cut, tiers_of(table, cut).apart):
        yield unit, table.pool.key(unit.blocks)
