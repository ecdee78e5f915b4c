"""`paged_attention` of one new token to lists of blocks that were there for the one before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import paged_attention_kernel as kernel
from cpu_kernels.paged_attention import attention_job, check_lists
from cpu_kernels.paged_attention_jobs import chunk_counter, chunk_runner
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.kv import KvLayout
from formats.packed import round_up

Int64 = npt.NDArray[np.int64]


def rows_elements(layout: KvLayout, lists: int, heads: int) -> int:
    """Elements of the scratch that as many lists of blocks and query heads take."""
    return (lists * heads + 1) * round_up(layout.key_width, 16)


class PreparedAttention:
    """One sequence's lists of blocks. Its bits are those of `paged_attention`.

    What a call has to find out and to check is found out once, as long as the last block is the same.

    Attributes:
        out: fp32 [lists, Hq, 1, V], what the last call computed.
        lse: fp32 [lists, Hq, 1], likewise.
        last_length: tokens of the last list when it was prepared.
    """

    def __init__(
        self,
        layout: KvLayout,
        scale: float,
        offsets: Int64,
        addresses: Int64,
        lengths: Int64,
        first_positions: Int64,
        rows: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Prepare; arguments as of `paged_attention`.

        Args:
            layout: of the blocks.
            scale: of the scores.
            offsets: int64 [lists + 1].
            addresses: int64, of blocks.
            lengths: int64 [lists], tokens of each; those of the last may grow within its last block.
            first_positions: int64 [lists].
            rows: fp32 of `rows_elements`, scratch of a call.
            out: fp32 [lists, Hq, 1, V], contiguous, to write to.
            lse: fp32 [lists, Hq, 1], likewise.

        Raises:
            ValueError: a shape or number that does not fit.
        """
        lists, heads, width = len(lengths), out.shape[1], layout.key_width
        if heads % layout.kv_heads or out.shape != (lists, heads, 1, layout.output_width) or lse.shape != out.shape[:3]:
            raise ValueError(f"out, lse: found {describe(out)} and {describe(lse)} for {lists} lists of {layout}")
        position = int(first_positions[-1] + lengths[-1]) - 1
        self.out, self.lse, self.last_length = out, lse, int(lengths[-1])
        self._lengths, self._positions = lengths.copy(), np.full((lists, 1), position, np.int64)
        self._kept = offsets.copy(), addresses.copy(), first_positions.copy()
        own_offsets, own_addresses, firsts = self._kept
        check_lists(lists, 1, own_offsets, own_addresses, self._lengths, firsts, self._positions, layout, None)
        group, columns = heads // layout.kv_heads, round_up(width, 16)
        used = rows_elements(layout, lists, heads)
        whole = rows[: used - columns].view(lists, layout.kv_heads, group, columns)
        self._rows, self._shape = whole[..., :width], (1, layout.kv_heads, group, width)
        # What is only read: the ends of rows, and a row more than there is.
        self._zeros = [rows[used - columns : used], *([whole[..., width:]] if width < columns else [])]
        job = attention_job(layout, group, scale)
        job[kernel.QUERIES], job[kernel.ADDRESSES] = rows.data_ptr(), own_addresses.ctypes.data
        job[kernel.LENGTHS], job[kernel.FIRST_POSITIONS] = self._lengths.ctypes.data, firsts.ctypes.data
        job[kernel.QUERY_POSITIONS], job[kernel.POSITIONS] = self._positions.ctypes.data, 1
        job[kernel.OUT], job[kernel.LSE] = out.data_ptr(), lse.data_ptr()
        self._lists = job, own_offsets, self._lengths, firsts, self._positions
        self._counts = chunk_counter()(*self._lists)
        self._tasks = kernel.attention_task(), kernel.combine_task()
        self._run = chunk_runner()

    def attend(self, query: torch.Tensor, last_length: int, position: int, pool: Pool) -> None:
        """Fill `out` and `lse`.

        Args:
            query: [1, Hq, 1, D] on the CPU, contiguous, bf16, fp16 or fp32.
            last_length: tokens of the last list, whose last block is that of the preparation.
            position: of the query.
            pool: the threads.
        """
        self._lengths[-1] = last_length
        self._positions.fill(position)
        self._lists[0][kernel.THREADS] = pool.threads
        self._rows.copy_(query.view(self._shape))
        for part in self._zeros:
            part.zero_()
        self._run(*pool.launcher, *self._tasks, self._counts, workspace(int(self._counts[3])), *self._lists)
