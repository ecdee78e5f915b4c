"""The newest blocks of all caches, in an accelerator's memory; older ones go down to host memory over its link."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import NamedTuple

from offload.devices.base import KvAccelerator, Slab
from offload.devices.link import CHUNK_NBYTES
from offload.kv.below import AHEAD_BLOCKS, Below
from offload.kv.chunked_slots import ChunkedSlots
from offload.kv.records import BlockRecords
from offload.kv.slots import view
from offload.tiers.transfer import ReadEngine, ReadRequest, Ticket, Urgency


class Sealed(NamedTuple):
    """A block that may leave. Lower ones leave first: those of a sequence's segment one after the other, so that few
    segments at a time are in part here and in part below.

    Attributes:
        segment: number of the segment, by the block's first token.
        owner: number of one sequence of one layer.
        first_token: of the block.
        block: its number.
        serial: how often the number was used before.
    """

    segment: int
    owner: int
    first_token: int
    block: int
    serial: int


class _Move(NamedTuple):
    """A block on its way down, attended above until its memory is needed.

    Attributes:
        entry: the block.
        target: address of its slot in host memory.
        ticket: of the copy.
    """

    entry: Sealed
    target: int
    ticket: Ticket


class Above:
    """Slots in an accelerator's memory, and the copies down. The caller holds the pool's lock.

    Attributes:
        accelerator: whose memory.
        slots: of its memory.
        blocks_moved: since the start.
        stall_s: seconds that the model waited for copies.
    """

    def __init__(
        self,
        records: BlockRecords,
        accelerator: KvAccelerator,
        slab: Slab,
        largest_nbytes: int,
        below: Below,
        free: Callable[[int], None],
    ) -> None:
        """An empty tier.

        Args:
            records: of all blocks.
            accelerator: see above.
            slab: its memory for blocks.
            largest_nbytes: of a block.
            below: where blocks go.
            free: what to do with a block that nobody refers to any more when it would leave.
        """
        self.accelerator = accelerator
        self.slots = ChunkedSlots(slab, largest_nbytes)
        self.blocks_moved = 0
        self.stall_s = 0.0
        self._records = records
        self._below = below
        self._free = free
        self._sealed: list[Sealed] = []
        self._moves: deque[_Move] = deque()
        self._moving: set[int] = set()
        self._engine = ReadEngine(accelerator.copy_down_reader(), threads=1, chunk_nbytes=CHUNK_NBYTES)

    @property
    def bytes_moved(self) -> int:
        """Bytes that came down, those included that were attended below and stayed."""
        return self._engine.reader.bytes_read

    def is_moving(self, block: int) -> bool:
        """Whether a block is on its way down."""
        return block in self._moving

    def moving_nbytes(self) -> int:
        """Bytes of host memory that wait for blocks."""
        return sum(int(self._records.sizes[move.entry.block]) for move in self._moves)

    def seal(self, block: int, first_token: int, segment_tokens: int) -> None:
        """Let a block leave when memory is needed.

        Args:
            block: its number.
            first_token: of the block; lower ones leave first.
            segment_tokens: tokens of a segment.
        """
        owner, serial = int(self._records.owners[block]), int(self._records.serials[block])
        heapq.heappush(self._sealed, Sealed(first_token // segment_tokens, owner, first_token, block, serial))

    def take(self, nbytes: int) -> int | None:
        """The address of a slot; None where blocks that are written to leave no room for it, here or below.

        Raises:
            StorageError: see `Below.take`.
        """
        if nbytes > self.slots.chunk_nbytes:
            return None
        while (address := self.slots.take(nbytes)) is None:
            if not self._moves and not self._start_move():
                return None
            self._finish_move()
        return address

    def move_ahead(self) -> None:
        """Where memory gets short, copy the next blocks before somebody has to wait for them.

        Raises:
            StorageError: see `Below.take`.
        """
        slots, ahead = self.slots, min(AHEAD_BLOCKS, len(self._sealed) // 4 + 1)
        while (
            self._sealed
            and len(self._moves) < ahead
            and slots.budget_nbytes - slots.used_nbytes < ahead * self._records.sizes[self._sealed[0].block]
            and self._start_move()
        ):
            pass

    def bring(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy (address here, address in host memory, bytes) and return when all are there."""
        tickets = [self._copy(*copy, Urgency.NOW) for copy in copies]
        self._wait(tickets)
        for ticket in tickets:
            _check(ticket)

    def _start_move(self) -> bool:
        """Begin to copy the oldest sealed block down; False where there is none, or nothing below may give way."""
        records = self._records
        while self._sealed:
            entry = self._sealed[0]
            if not records.is_current(entry.block, entry.serial):
                heapq.heappop(self._sealed)
                continue
            size = int(records.sizes[entry.block])
            target = self._below.take_if_any(size)
            if target is None:
                return False
            heapq.heappop(self._sealed)
            ticket = self._copy(int(records.addresses[entry.block]), target, size, Urgency.SOON)
            self._moves.append(_Move(entry, target, ticket))
            self._moving.add(entry.block)
            self.blocks_moved += 1
            return True
        return False

    def _finish_move(self) -> None:
        """Take the memory of the block that has been moving longest."""
        records = self._records
        entry, target, ticket = self._moves[0]
        if not ticket.finished:
            self._engine.promote(ticket)
            self._wait([ticket])
        block, size = entry.block, int(records.sizes[entry.block])
        self._moves.popleft()
        self._moving.remove(block)
        if records.refs[block] == 0:
            self._below.slots.give(target, size)
            self._free(block)
        elif not ticket.succeeded:
            self._below.slots.give(target, size)
            heapq.heappush(self._sealed, entry)
            _check(ticket)
        else:
            self.slots.give(int(records.addresses[block]), size)
            records.move(block, target)
            self._below.seal(block, entry.first_token)

    def _copy(self, address: int, target: int, nbytes: int, urgency: Urgency) -> Ticket:
        request = ReadRequest(0, address, view(target, nbytes), None, "KV blocks", "load again")
        return self._engine.submit(request, urgency)

    def _wait(self, tickets: list[Ticket]) -> None:
        before = perf_counter()
        self._engine.wait_all(tickets)
        self.stall_s += perf_counter() - before

    def check(self) -> None:
        """Prove that what moves is here.

        Raises:
            AssertionError: it is not.
        """
        moving = [move.entry.block for move in self._moves]
        assert len(moving) == len(self._moving) and self._moving == set(moving), "a block moves that nobody copies"
        assert self._records.is_above[moving].all(), "a block moves that is not above"

    def close(self) -> None:
        """Stop copying. May be called again."""
        self._engine.close()


def _check(ticket: Ticket) -> None:
    if not ticket.succeeded:
        raise ticket.error or RuntimeError("a copy of KV blocks from an accelerator was cancelled")
