"""The history of one layer: which blocks, in which order, for every sequence."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks import TokenWriter, read_tokens
from formats.kv import KvLayout
from offload.errors import UnsupportedOperationError
from offload.kv import contents
from offload.kv.evicted import Evicted
from offload.kv.held import Held
from offload.kv.pool import BlockPool
from offload.kv.sparsity.base import TableSparsity
from placement.kv_settings import KvSettings

if TYPE_CHECKING:
    from offload.kv.few_tokens import FewTokens

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

_SEQUENCES_OF_A_TABLE = 1 << 20
_numbers = itertools.count()


class Layouts(NamedTuple):
    """How blocks of a layer lie.

    Attributes:
        plain: of blocks that are written to.
        packed: of old ones; None where they stay as they are.
    """

    plain: KvLayout
    packed: KvLayout | None


class BlockTable:
    """Blocks of one layer. Columns are blocks in the order of tokens, rows are sequences, all of one length.

    The first `sealed` columns stay as they are: packed where the layer packs, plain and full where it does not. The
    others are plain; only the last is written to, and only where one sequence refers to it.

    Every call takes the pool's lock.

    Attributes:
        pool: where the blocks are.
        layouts: see there.
        settings: see there.
        tokens: of each sequence, that the table holds.
        sealed: see above.
        follower: the table that is attended after this one; its blocks are read ahead.
        sparsity: attends to a part of the table; None where all of it is attended to.
        evicted: what it has lost; None where nothing.
        few_tokens: what attention of the next few tokens may find as it was; None where nothing is kept.
    """

    def __init__(self, pool: BlockPool, layouts: Layouts, settings: KvSettings, sequences: int) -> None:
        self.pool = pool
        self.layouts = layouts
        self.settings = settings
        self.tokens = 0
        self.sealed = 0
        self.follower: weakref.ref[BlockTable] | None = None
        self.sparsity: TableSparsity | None = None
        self.evicted: Evicted | None = None
        self.few_tokens: FewTokens | None = None
        self._writer: TokenWriter | None = None
        self._number = next(_numbers)
        self._held = Held(np.zeros((sequences, 0), np.int64), 0)
        self._finalizer = weakref.finalize(self, pool.abandoned.append, self._held)
        self._finalizer.atexit = False

    @property
    def sequences(self) -> int:
        """Rows."""
        return len(self._held.blocks)

    @property
    def length(self) -> int:
        """Tokens of each sequence, evicted ones too."""
        return self.tokens + (0 if self.evicted is None else self.evicted.tokens)

    def held_valid(self, valid: Bool | None) -> Bool | None:
        """Of a mask over all tokens [sequences, length], what belongs to those that the table holds, maybe in memory
        that the next call writes to.
        """
        return valid if valid is None or self.evicted is None else self.evicted.held(valid)

    @property
    def version(self) -> tuple[int, int, int, int]:
        """Another one whenever a block of any table comes, goes or moves, or this one refers to others."""
        return self.pool.records.version, self._held.version, self.sealed, self.columns

    @property
    def columns(self) -> int:
        """Blocks of a sequence, the last maybe in part."""
        return -(-self.tokens // self.settings.block_tokens)

    def blocks(self, row: int, first: int, end: int) -> Int64:
        """Numbers of the blocks in some columns of a sequence."""
        return self._held.blocks[row, first:end]

    def all_blocks(self, columns: int) -> Int64:
        """Numbers of the blocks in the first columns of every sequence."""
        return self._held.blocks[:, :columns]

    def layout_of(self, column: int) -> KvLayout:
        """How the blocks of a column lie."""
        packed = self.layouts.packed
        return packed if packed is not None and column < self.sealed else self.layouts.plain

    def _owner(self, row: int) -> int:
        return self._number * _SEQUENCES_OF_A_TABLE + row

    # --- growing -----------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor | None) -> None:
        """Add tokens to every sequence.

        Args:
            keys: [sequences, heads, T, key width], on any device.
            values: [sequences, heads, T, value width]; None where they are part of the keys.

        Raises:
            DoesNotFitError, StorageError: no memory can be had for them; the table holds the first of them only.
        """
        size, done, new = self.settings.block_tokens, 0, keys.shape[2]
        with self.pool.use():
            if self.pool.above is None:
                # All that is written goes into host memory.
                keys, values = keys.cpu(), None if values is None else values.cpu()
            if new == self.sequences == 1 and self._append_to_last(keys, values):
                return
            self._own_tail()
            while done < new:
                first = self.tokens // size
                count = min(new - done, (first + self.settings.piece_blocks) * size - self.tokens)
                span = slice(done, done + count)
                self._write(keys[:, :, span], None if values is None else values[:, :, span], first)
                done += count
                self._age()

    def _append_to_last(self, keys: torch.Tensor, values: torch.Tensor | None) -> bool:
        """Add a token to the one sequence's last block, if that is its own and neither begins nor ends with it."""
        place = self.tokens % self.settings.block_tokens
        block = int(self._held.blocks[0, self._held.columns - 1]) if place else -1
        if place in (0, self.settings.block_tokens - 1) or self.pool.refs[block] != 1:
            return False
        if self.pool.is_above[block]:
            own = self._held.blocks[:, self._held.columns - 1 : self._held.columns]
            contents.write(self.pool, keys, values, own, np.array([place]), self.layouts.plain)
            self.tokens += 1
            return True
        keys, values = keys.cpu(), None if values is None else values.cpu()
        address = int(self.pool.addresses[block])
        writer = self._writer
        if writer is None or not writer.takes(keys, values, address):
            writer = self._writer = TokenWriter(keys, values, address, self.layouts.plain)
        writer.write(keys, values, place)
        self.tokens += 1
        return True

    def _write(self, keys: torch.Tensor, values: torch.Tensor | None, first: int) -> None:
        """Write tokens into the columns from `first` on, made where they are missing."""
        size, rows, held = self.settings.block_tokens, self.sequences, self._held
        end = -(-(self.tokens + keys.shape[2]) // size)
        held.reserve(end)
        while held.columns < end:
            held.add(self._new(self.layouts.plain, range(rows)))
        starts = np.full(rows, self.tokens - first * size)
        contents.write(self.pool, keys, values, held.blocks[:, first:end], starts, self.layouts.plain)
        self.tokens += keys.shape[2]

    def _new(self, layout: KvLayout, rows: Iterable[int]) -> list[int]:
        made: list[int] = []
        try:
            for row in rows:
                made.append(self.pool.new(layout.nbytes, self._owner(row)))
        except BaseException:
            self.pool.release(np.array(made, np.int64))
            raise
        return made

    def _age(self) -> None:
        """Pack what is no longer recent, and seal what nobody writes to any more."""
        size, packed = self.settings.block_tokens, self.layouts.packed
        end = self.tokens // size - (self.settings.recent_tokens // size if packed is not None else 0)
        while self.sealed < end:
            if packed is not None:
                self._pack(self.sealed, packed)
            if self.sparsity is not None:
                self.sparsity.sealed(self, self.sealed)
            for block in set(self._held.blocks[:, self.sealed].tolist()):
                self.pool.seal(block, self.sealed * size)
            self.sealed += 1

    def _pack(self, column: int, layout: KvLayout) -> None:
        """Put packed blocks in place of a column's plain ones; sequences that shared one share the other."""
        old, first_rows, row_of = np.unique(self._held.blocks[:, column], return_index=True, return_inverse=True)
        new = np.array(self._new(layout, first_rows.tolist()), np.int64)
        try:
            contents.pack(self.pool, old, self.layouts.plain, new, layout)
        except BaseException:
            self.pool.release(new)
            raise
        self._replace(column, np.arange(self.sequences), new[row_of], new)

    def _replace(self, column: int, rows: Int64, blocks: Int64, owned: Int64) -> None:
        """Refer to other blocks; of `owned` there is one reference already."""
        old = self._held.blocks[rows, column].copy()
        self.pool.share(blocks)
        self.pool.release(owned)
        self._held.put(rows, column, blocks)
        self.pool.release(old)

    def _own_tail(self) -> None:
        """See that nobody else refers to the blocks that will be written to."""
        size = self.settings.block_tokens
        if self.tokens % size == 0:
            return
        column = self.tokens // size
        for row, block in enumerate(self._held.blocks[:, column].tolist()):
            if self.pool.refs[block] > 1:
                self._copy(column, row, block)

    def _copy(self, column: int, row: int, block: int) -> None:
        """Give a sequence a block of its own with the same bytes."""
        new = np.array(self._new(self.layouts.plain, [row]), np.int64)
        try:
            self.pool.copy(block, int(new[0]))
        except BaseException:
            self.pool.release(new)
            raise
        self._replace(column, np.array([row]), new, new)

    # --- changing ----------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget all tokens but the first so many of those that the table holds.

        Raises:
            StorageError, StoreCorruptError: a block that becomes the last cannot be read; nothing has changed.
            UnsupportedOperationError: tokens that would be left are evicted; nothing has changed.
        """
        size = self.settings.block_tokens
        with self.pool.use():
            if tokens >= self.tokens:
                return
            if self.evicted is not None and tokens < self.evicted.kept:
                raise UnsupportedOperationError(
                    f"crop: {self.tokens - tokens} tokens cannot be taken back, for of the ones before the newest "
                    f"{self.tokens - self.evicted.kept} some were evicted; start a new cache, or load with "
                    'kv_sparsity="top-k:..." or without'
                )
            column = tokens // size
            if tokens % size and column < self.sealed:
                self._reopen(column)
            self.sealed = min(self.sealed, column)
            self.tokens = tokens
            if self.sparsity is not None:
                self.sparsity.cut(self)
            self.pool.release(self._held.cut(self.columns))

    def _reopen(self, column: int) -> None:
        """Make a sealed column one that is written to."""
        for row, block in enumerate(self._held.blocks[:, column].tolist()):
            if self.layouts.packed is not None:
                self._unpack(column, row, block)
            elif not self.pool.reopen(block):
                self._copy(column, row, block)

    def _unpack(self, column: int, row: int, block: int) -> None:
        layouts, size = self.layouts, self.settings.block_tokens
        assert layouts.packed is not None
        new = np.array(self._new(layouts.plain, [row]), np.int64)
        try:
            with self.pool.at_hand(np.array([block])) as addresses:
                keys, values = read_tokens(addresses, 0, size, layouts.packed)
        except BaseException:
            self.pool.release(new)
            raise
        own = None if layouts.plain.value_from_key else values[None]
        contents.write(self.pool, keys[None], own, new[None], np.zeros(1, np.int64), layouts.plain)
        self._replace(column, np.array([row]), new, new)

    def select(self, rows: Int64) -> None:
        """Let the sequences be those of some rows, in that order; a row may come more than once."""
        with self.pool.use():
            old = self._held.cut(0)
            self.pool.share(old.reshape(self.sequences, -1)[rows].reshape(-1))
            self.pool.release(old)
            self._held.set(old.reshape(self.sequences, -1)[rows])
            if self.evicted is not None:
                self.evicted = self.evicted.select(rows)
            if self.sparsity is not None:
                self.sparsity.select(rows)

    def drop(self, columns: Int64, valid: Bool | None) -> None:
        """Evict blocks.

        Args:
            columns: int64 [sequences, n] of sealed ones, no two of a sequence alike.
            valid: bool [sequences, length], False where a token is padding; None for none.
        """
        size = self.settings.block_tokens
        with self.pool.use():
            keep = np.ones((self.sequences, self.columns), np.bool_)
            np.put_along_axis(keep, columns, False, 1)
            held = self.held_valid(np.ones((self.sequences, self.length), np.bool_) if valid is None else valid)
            assert held is not None
            front = max((int(columns.max()) + 1) * size, 0 if self.evicted is None else self.evicted.kept)
            stay = np.repeat(keep, size, axis=1)[:, :front]
            blocks = self._held.blocks[:, : self.columns]
            left, gone = blocks[keep].reshape(self.sequences, -1), blocks[~keep]
            missing = columns.shape[1] * size
            self._note_evicted(missing, held[:, :front][stay].reshape(self.sequences, -1))
            self._held.set(left)
            self.pool.release(gone)
            self.sealed -= columns.shape[1]
            self.tokens -= missing

    def rewrite(self, keys: torch.Tensor, values: torch.Tensor | None, valid: Bool) -> None:
        """Hold other tokens instead, out of those that it holds.

        Args:
            keys: [sequences, heads, T, key width].
            values: as of `append`.
            valid: bool [sequences, n], of the first n, among which some are missing, False where one is padding. The
                others are the last that the table holds, all of them.

        Raises:
            DoesNotFitError, StorageError: no memory can be had for them; nothing has changed.
        """
        with self.pool.use():
            other = BlockTable(self.pool, self.layouts, self.settings, self.sequences)
            other.append(keys, values)
            self._note_evicted(self.tokens - other.tokens, valid)
            self._held.swap(other._held)
            self.tokens, self.sealed = other.tokens, other.sealed

    def _note_evicted(self, tokens: int, valid: Bool) -> None:
        self.evicted = Evicted(tokens + (0 if self.evicted is None else self.evicted.tokens), valid)
        self.pool.counters.sparsity.evicted_tokens += tokens * self.sequences

    def copy(self) -> BlockTable:
        """Another table of the same tokens, which shares all blocks until one of them grows."""
        with self.pool.use():
            other = BlockTable(self.pool, self.layouts, self.settings, self.sequences)
            blocks = self._held.blocks[:, : self._held.columns]
            self.pool.share(blocks.reshape(-1))
            other._held.set(blocks)
            other.tokens, other.sealed = self.tokens, self.sealed
            other.evicted = None if self.evicted is None else self.evicted.copy()
            other.sparsity = None if self.sparsity is None else self.sparsity.copy()
            return other

    def restore(self, found: Iterable[npt.NDArray[np.uint8]], tokens: int, sealed: int) -> None:
        """Take over the blocks that another table with these layouts had for one sequence; this one is empty.

        Args:
            found: uint8, the bytes of the block of each column.
            tokens: the other's.
            sealed: the other's.

        Raises:
            DoesNotFitError, StorageError: no memory can be had for them; the table stays empty.
            Exception: whatever `found` raises; likewise.
        """
        held, size = self._held, self.settings.block_tokens
        with self.pool.use():
            held.reserve(-(-tokens // size))
            try:
                for column, content in enumerate(found):
                    packed = self.layouts.packed if column < sealed else None
                    held.add(self._new(packed or self.layouts.plain, [0]))
                    block = int(held.blocks[0, column])
                    contents.fill(self.pool, block, content)
                    if column < sealed:
                        if self.sparsity is not None:
                            self.sparsity.sealed(self, column)
                        self.pool.seal(block, column * size)
            except BaseException:
                self.pool.release(held.cut(0))
                raise
            self.tokens, self.sealed = tokens, sealed

    # --- reading -----------------------------------------------------------------------------------------------

    def read(
        self, row: int, first: int, end: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some tokens of one sequence: keys [heads, end - first, key width] and values.

        Raises:
            StorageError, StoreCorruptError: blocks cannot be read.
        """
        size, step = self.settings.block_tokens, self.settings.segment_blocks
        parts = []
        with self.pool.use():
            while first < end:
                column = first // size
                last = min(-(-end // size), column + step)
                if column < self.sealed < last:
                    last = self.sealed
                count = min(end, last * size) - first
                with self.pool.at_hand(self.blocks(row, column, last)) as addresses:
                    layout = self.layout_of(column)
                    parts.append(read_tokens(addresses, first - column * size, count, layout, dtype))
                first += count
        keys, values = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
        return keys, values
