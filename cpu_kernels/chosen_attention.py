"""Attention to blocks of which each key-value head chooses others at every step, in memory that is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import paged_attention_kernel as kernel
from cpu_kernels.block_selection import NO_MASK, attend_to_lists
from cpu_kernels.block_selection_kernel import list_chosen
from cpu_kernels.paged_attention import attention_job, check_valid
from cpu_kernels.paged_attention_jobs import chunk_counter, chunk_runner
from cpu_kernels.prepared_attention import rows_elements
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.kv import KvLayout
from formats.packed import round_up

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class ChosenAttention:
    """Attention of tokens to chosen full blocks before them. A head of a block lies as a block of one head does.

    What all heads of a sequence chose is cut into units of as many blocks, each attended by itself, so that one whose
    blocks have to be read can wait for them. A step allocates nothing that grows with the history.

    Attributes:
        chosen: int64 [B, Hk, count], ascending columns, for the caller to write.
        units: of each sequence, at most; those that it does not have are empty.
        cold: int64, after `look`, the units in which blocks have no address: sequence times units plus unit.
    """

    def __init__(
        self, layout: KvLayout, scale: float, shape: tuple[int, int, int], count: int, columns: int, unit_blocks: int
    ) -> None:
        """Memory for steps.

        Args:
            layout: of the blocks.
            scale: of the scores.
            shape: sequences, query heads and new tokens.
            count: blocks that a head chooses.
            columns: that it chooses from.
            unit_blocks: see above.
        """
        (sequences, heads, new), kv_heads = shape, layout.kv_heads
        rows, most = sequences * kv_heads, min(columns, kv_heads * count)
        self._layout, self._scale, self._unit_blocks, self._shape = layout, scale, unit_blocks, shape
        self.units = -(-most // unit_blocks)
        self.chosen = np.zeros((sequences, kv_heads, count), np.int64)
        self.cold = np.zeros(0, np.int64)
        lists = rows * self.units
        self._marks = np.zeros(max(columns, self.units), np.uint8)
        self._unions, self._counts = np.zeros((sequences, most), np.int64), np.zeros(sequences, np.int64)
        self._listed, self._offsets = np.zeros(rows * count, np.int64), np.zeros(lists + 1, np.int64)
        self._lengths, self._firsts, self._starts = (np.zeros(lists, np.int64) for _ in range(3))
        self._mask = np.ones((rows, count * layout.block_tokens), np.uint8)
        self._is_masked = False
        self._all_cold = np.zeros(sequences * self.units, np.int64)
        # Of every list: the head of a sequence whose query and mask it has, and where its part belongs.
        self._rows = np.repeat(np.arange(rows), self.units)
        self._places = np.tile(np.arange(self.units), rows) * rows + self._rows
        self._positions = np.full((lists, new), count * layout.block_tokens - 1)
        group, columns_of_query = heads // kv_heads, round_up(layout.key_width, 16)
        # Zeros after a key's width, and a row more than there is, which is only read.
        self._queries = torch.zeros(rows_elements(layout, sequences, heads * new))
        whole = self._queries[:-columns_of_query].view(sequences, kv_heads, new, group, columns_of_query)
        self._query_rows = whole[..., : layout.key_width]
        self._query_shape = sequences, kv_heads, group, new, layout.key_width
        job = attention_job(replace(layout, kv_heads=1), group, scale)
        job[kernel.QUERIES], job[kernel.ADDRESSES] = self._queries.data_ptr(), self._listed.ctypes.data
        job[kernel.LENGTHS], job[kernel.FIRST_POSITIONS] = self._lengths.ctypes.data, self._firsts.ctypes.data
        job[kernel.QUERY_POSITIONS], job[kernel.POSITIONS] = self._positions.ctypes.data, new
        job[kernel.LIST_ROWS], job[kernel.LIST_PLACES] = self._rows.ctypes.data, self._places.ctypes.data
        job[kernel.VALID_STRIDE] = self._mask.strides[0]
        self._lists = job, self._offsets, self._lengths, self._firsts, self._positions

    def look(self, blocks: Int64, addresses: Int64, valid: Bool | None) -> None:
        """See where the chosen blocks are.

        Args:
            blocks: int64 [B, columns or more], numbers of blocks.
            addresses: int64, by number; 0 where a block has none.
            valid: bool [B, S], False where a token is padding; None for none.

        Raises:
            ValueError: a mask that does not fit.
        """
        layout = self._layout
        check_valid(valid, len(self.chosen), len(self._marks) * layout.block_tokens)
        self._is_masked = valid is not None
        count = list_chosen(
            self.chosen, blocks, addresses, self._unit_blocks, layout.block_tokens, layout.head_nbytes,
            NO_MASK if valid is None else valid.view(np.uint8), self._marks, self._unions, self._counts, self._listed,
            self._offsets, self._lengths, self._firsts, self._starts, self._mask, self._all_cold,
        )  # fmt: skip
        self.cold = self._all_cold[:count]

    def columns(self, sequence: int, unit: int) -> Int64:
        """Those of a unit, ascending: what any of the heads chose."""
        first, end = unit * self._unit_blocks, min((unit + 1) * self._unit_blocks, int(self._counts[sequence]))
        return self._unions[sequence, first:end]

    def attend(self, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, pool: Pool) -> None:
        """Fill `out` and `lse`, in cold units with what is of no keys.

        Args:
            query: [B, Hq, T, D] on the CPU, contiguous, bf16, fp16 or fp32.
            out: fp32 [units, B, Hq, T, V], contiguous.
            lse: fp32 [units, B, Hq, T], contiguous.
            pool: the threads.
        """
        job = self._lists[0]
        assert out.is_contiguous() and lse.is_contiguous() and out.shape[:4] == (self.units, *self._shape)
        job[kernel.OUT], job[kernel.LSE] = out.data_ptr(), lse.data_ptr()
        job[kernel.VALID] = self._mask.ctypes.data if self._is_masked else 0
        job[kernel.THREADS] = pool.threads
        self._query_rows.copy_(query.view(self._query_shape).transpose(2, 3))
        counts = chunk_counter()(*self._lists)
        tasks = kernel.attention_task(), kernel.combine_task()
        chunk_runner()(*pool.launcher, *tasks, counts, workspace(int(counts[3])), *self._lists)

    def attend_unit(
        self, query: torch.Tensor, sequence: int, unit: int, addresses: Int64, out: torch.Tensor, lse: torch.Tensor,
        pool: Pool,
    ) -> None:  # fmt: skip
        """Fill one unit of a sequence.

        Args:
            query: [B, Hq, T, D].
            sequence: its number.
            unit: its number.
            addresses: int64, of the blocks of `columns`.
            out: as of `attend`.
            lse: likewise.
            pool: the threads.
        """
        union, size = self.columns(sequence, unit), self._layout.block_tokens
        spans = []
        for head in range(self._layout.kv_heads):
            index = (sequence * self._layout.kv_heads + head) * self.units + unit
            start, length = int(self._starts[index]), int(self._offsets[index + 1] - self._offsets[index])
            spans.append((head, start, start + length))
        counts = np.array([[end - start for _, start, end in spans]])
        places = [np.searchsorted(union, self.chosen[sequence, head, start:end]) for head, start, end in spans]
        valid = None
        if self._is_masked:
            valid = np.zeros((1, len(spans), int(counts.max()) * size), np.bool_)
            for head, start, end in spans:
                row = self._mask[sequence * len(spans) + head, start * size : end * size]
                valid[0, head, : len(row)] = row
        attend_to_lists(
            query[sequence : sequence + 1], counts, addresses[np.concatenate(places)], self._layout, self._scale,
            valid=valid, into=(out[unit, sequence], lse[unit, sequence]), pool=pool,
        )  # fmt: skip
