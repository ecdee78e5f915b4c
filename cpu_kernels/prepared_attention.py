"""`paged_attention` of a few new tokens to lists of blocks that were there for the step before."""

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
    """Elements of the scratch that as many lists of blocks and query rows, heads times tokens, take."""
    return (lists * heads + 1) * round_up(layout.key_width, 16)


class PreparedAttention:
    """Lists of blocks, as many of each sequence, those of all sequences in turn. Its bits are those of
    `paged_attention`.

    What a call has to find out and to check is found out once, as long as the last blocks are the same.

    Attributes:
        out: fp32 [lists, Hq, T, V], what the last call computed.
        lse: fp32 [lists, Hq, T], likewise.
        last_lengths: int64 [sequences], tokens of each one's last list when it was prepared.
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
        sequences: int = 1,
    ) -> None:
        """Prepare; arguments as of `paged_attention`.

        Args:
            layout: of the blocks.
            scale: of the scores.
            offsets: int64 [lists + 1].
            addresses: int64, of blocks.
            lengths: int64 [lists], tokens of each; those of each sequence's last may grow within its last block. Of one
                of none the blocks may be anything.
            first_positions: int64 [lists].
            rows: fp32 of `rows_elements`, scratch of a call.
            out: fp32 [lists, Hq, T, V], contiguous, to write to.
            lse: fp32 [lists, Hq, T], likewise.
            sequences: list i is one of sequence i modulo that.

        Raises:
            ValueError: a shape or number that does not fit.
        """
        lists, (heads, new), width = len(lengths), out.shape[1:3], layout.key_width
        shape = lists, heads, new
        fits = out.shape == (*shape, layout.output_width) and lse.shape == shape
        if not fits or heads % layout.kv_heads or lists % sequences:
            raise ValueError(f"out, lse: found {describe(out)} and {describe(lse)} for {lists} lists of {layout}")
        self.out, self.lse, self.last_lengths = out, lse, lengths[-sequences:].copy()
        self._lengths, self._positions = lengths.copy(), np.zeros((lists, new), np.int64)
        self._kept = offsets.copy(), addresses.copy(), first_positions.copy()
        self._sequences = sequences
        own_offsets, own_addresses, firsts = self._kept
        self._positions[:] = int((firsts + self._lengths).max()) - 1
        check_lists(lists, new, own_offsets, own_addresses, self._lengths, firsts, self._positions, layout, None)
        group, columns = heads // layout.kv_heads, round_up(width, 16)
        used = rows_elements(layout, lists, heads * new)
        whole = rows[: used - columns].view(lists // sequences, sequences, layout.kv_heads, new, group, columns)
        self._rows, self._shape = whole[..., :width], (1, sequences, layout.kv_heads, group, new, width)
        # What is only read: the ends of rows, and a row more than there is.
        self._zeros = [rows[used - columns : used], *([whole[..., width:]] if width < columns else [])]
        job = attention_job(layout, group, scale)
        job[kernel.QUERIES], job[kernel.ADDRESSES] = rows.data_ptr(), own_addresses.ctypes.data
        job[kernel.LENGTHS], job[kernel.FIRST_POSITIONS] = self._lengths.ctypes.data, firsts.ctypes.data
        job[kernel.QUERY_POSITIONS], job[kernel.POSITIONS] = self._positions.ctypes.data, new
        job[kernel.OUT], job[kernel.LSE] = out.data_ptr(), lse.data_ptr()
        self._lists = job, own_offsets, self._lengths, firsts, self._positions
        self._counts = chunk_counter()(*self._lists)
        self._tasks = kernel.attention_task(), kernel.combine_task()
        self._run = chunk_runner()

    def attend(self, query: torch.Tensor, last_length: int | Int64, position: int, pool: Pool) -> None:
        """Fill `out` and `lse`.

        Args:
            query: [sequences, Hq, T, D] on the CPU, contiguous, bf16, fp16 or fp32.
            last_length: tokens of each sequence's last list, whose last block is that of the preparation; int64
                [sequences] where they differ.
            position: of the last query; those before it are at the positions before.
            pool: the threads.
        """
        new = self._positions.shape[1]
        self._lengths[-self._sequences :] = last_length
        for t in range(new):
            self._positions[:, t] = position - new + 1 + t
        self._lists[0][kernel.THREADS] = pool.threads
        self._rows.copy_(query.view(self._shape).transpose(3, 4))
        for part in self._zeros:
            part.zero_()
        if new > 1:
            # Tokens before the last may see a block less than when it was prepared.
            self._counts = chunk_counter()(*self._lists)
        self._run(*pool.launcher, *self._tasks, self._counts, workspace(int(self._counts[3])), *self._lists)
