"""`paged_attention` of a few new tokens to lists of blocks that were there for the step before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import paged_attention_kernel as kernel
from cpu_kernels.paged_attention import attention_job, check_lists, check_rows, check_valid
from cpu_kernels.paged_attention_jobs import chunk_counter, chunk_runner
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.kv import KvLayout
from formats.packed import round_up

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


def rows_elements(layout: KvLayout, sequences: int, heads: int) -> int:
    """Elements of the scratch that the query rows of so many sequences, heads times tokens of each, take."""
    return (sequences * heads + 1) * round_up(layout.key_width, 16)


@dataclass(frozen=True)
class BlockLists:
    """Lists of blocks, as many as there are of each sequence; see `paged_attention`.

    Attributes:
        layout: of the blocks.
        offsets: int64 [lists + 1].
        addresses: int64, of blocks.
        lengths: int64 [lists], tokens of each; those of the growing ones may grow within their last block.
        first_positions: int64 [lists].
        rows: int64 [lists], the sequence of each.
        places: int64 [lists], where each writes to, no two alike.
        growing: int64, the numbers of lists that grow.
        sequences: of a query.
    """

    layout: KvLayout
    offsets: Int64
    addresses: Int64
    lengths: Int64
    first_positions: Int64
    rows: Int64
    places: Int64
    growing: Int64
    sequences: int


def one_list(layout: KvLayout, addresses: Int64) -> BlockLists:
    """A history of one sequence, of full blocks."""
    count, zero = len(addresses), np.zeros(1, np.int64)
    return BlockLists(
        layout, np.array([0, count]), addresses, np.array([count * layout.block_tokens]), zero, zero, zero, zero, 1
    )


class PreparedAttention:
    """Attention to lists of blocks. Its bits are those of `paged_attention`.

    What a call has to find out and to check is found out once, as long as the last blocks are the same.

    Attributes:
        out: fp32 [places, Hq, T, V], where calls leave what they computed.
        lse: fp32 [places, Hq, T], likewise.
    """

    def __init__(
        self, lists: BlockLists, scale: float, queries: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Prepare.

        Args:
            lists: what is attended to; copied.
            scale: of the scores.
            queries: fp32 of `rows_elements`, scratch of a call.
            out: fp32 [places, Hq, T, V], contiguous, to write to.
            lse: fp32 [places, Hq, T], likewise.

        Raises:
            ValueError: a shape or number that does not fit.
        """
        layout, count, sequences = lists.layout, len(lists.lengths), lists.sequences
        (heads, new), width = out.shape[1:3], layout.key_width
        shape = len(out), heads, new
        fits = out.shape == (*shape, layout.output_width) and lse.shape == shape
        if not fits or heads % layout.kv_heads:
            raise ValueError(f"out, lse: found {describe(out)} and {describe(lse)} for {count} lists of {layout}")
        self.out, self.lse = out, lse
        self._lengths, self._positions = lists.lengths.copy(), np.zeros((count, new), np.int64)
        self._kept = lists.offsets.copy(), lists.addresses.copy(), lists.first_positions.copy()
        self._rows_places = lists.rows.copy(), lists.places.copy()
        self._growing, self._sequences = lists.growing, sequences
        own_offsets, own_addresses, firsts = self._kept
        self._positions[:] = int((firsts + self._lengths).max()) - 1
        check_lists(count, new, own_offsets, own_addresses, self._lengths, firsts, self._positions, layout)
        rows, places = self._rows_places
        check_rows(rows, count, sequences)
        check_rows(places, count, len(out))
        group, columns = heads // layout.kv_heads, round_up(width, 16)
        used = rows_elements(layout, sequences, heads * new)
        whole = queries[: used - columns].view(sequences, layout.kv_heads, new, group, columns)
        self._rows, self._shape = whole[..., :width], (sequences, layout.kv_heads, group, new, width)
        # What is only read: the ends of rows, and a row more than there is.
        self._zeros = [queries[used - columns : used], *([whole[..., width:]] if width < columns else [])]
        job = attention_job(layout, group, scale)
        job[kernel.QUERIES], job[kernel.ADDRESSES] = queries.data_ptr(), own_addresses.ctypes.data
        job[kernel.LENGTHS], job[kernel.FIRST_POSITIONS] = self._lengths.ctypes.data, firsts.ctypes.data
        job[kernel.QUERY_POSITIONS], job[kernel.POSITIONS] = self._positions.ctypes.data, new
        job[kernel.LIST_ROWS], job[kernel.LIST_PLACES] = rows.ctypes.data, places.ctypes.data
        job[kernel.OUT], job[kernel.LSE] = out.data_ptr(), lse.data_ptr()
        self._lists = job, own_offsets, self._lengths, firsts, self._positions
        self._counts = chunk_counter()(*self._lists)
        self._tasks = kernel.attention_task(), kernel.combine_task()
        self._run = chunk_runner()

    def attend(
        self, query: torch.Tensor, last_length: int, position: int, pool: Pool, valid: Bool | None = None
    ) -> None:
        """Fill the lists' places of `out` and `lse`.

        Args:
            query: [sequences, Hq, T, D] on the CPU, contiguous, bf16, fp16 or fp32.
            last_length: tokens of each growing list, whose last block is that of the preparation.
            position: of the last query; those before it are at the positions before.
            pool: the threads.
            valid: bool [sequences, S], see `paged_attention`; S above `position`.

        Raises:
            ValueError: a mask that does not fit.
        """
        job, new = self._lists[0], self._positions.shape[1]
        check_valid(valid, self._sequences, position + 1)
        self._lengths[self._growing] = last_length
        for t in range(new):
            self._positions[:, t] = position - new + 1 + t
        job[kernel.THREADS] = pool.threads
        job[kernel.VALID] = 0 if valid is None else valid.ctypes.data
        job[kernel.VALID_STRIDE] = 0 if valid is None else valid.strides[0]
        self._rows.copy_(query.view(self._shape).transpose(2, 3))
        for part in self._zeros:
            part.zero_()
        if new > 1:
            # Tokens before the last may see a block less than when it was prepared.
            self._counts = chunk_counter()(*self._lists)
        self._run(*pool.launcher, *self._tasks, self._counts, workspace(int(self._counts[3])), *self._lists)
