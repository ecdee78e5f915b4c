# mypy: allow-untyped-defs
"""How the work of `paged_attention` is cut into chunks, and their start from one call of Python."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cpu_kernels.jit import entry, inner
from cpu_kernels.launch import launch_at
from cpu_kernels.paged_attention_block import BLOCK_TOKENS, GROUP, HEAD_NBYTES, PART_NBYTES
from cpu_kernels.paged_attention_kernel import (
    BLOCKS,
    CHUNK_FIELDS,
    CHUNKS,
    END_CHUNK,
    END_CHUNKS,
    END_FIELDS,
    ENDS,
    FIRST_BLOCK,
    FIRST_ROW,
    FIRST_TOKEN,
    GROUP_CHUNK,
    GROUP_CHUNKS,
    GROUP_FIELDS,
    GROUP_STRIDE,
    GROUPS,
    HEAD,
    IN_PLACE_ROWS,
    KV_HEADS,
    PART,
    PARTS,
    POSITIONS,
    ROWS,
    SEQUENCE,
    THREADS,
    TILE_ROWS,
    WINDOW,
)

# A chunk reads about so much of one head, and more where one head's tiles would have more than so many runs.
_RUN_NBYTES = 256 << 10
_MOST_CHUNKS = 256
# Groups for each thread that are left when heads go together, so that threads end at about the same time.
_LEAST_GROUPS = 8
_LISTS = "int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1]"


@inner
def _blocks_seen(job, positions, first_position, length, first_row, rows):
    """The blocks of a sequence that any row of a tile sees: [first, end)."""
    group, block_tokens = job[GROUP], job[BLOCK_TOKENS]
    lowest = highest = positions[first_row // group]
    for t in range(first_row // group, (first_row + rows - 1) // group + 1):
        lowest, highest = min(lowest, positions[t]), max(highest, positions[t])
    low = max(lowest - job[WINDOW] + 1 - first_position, 0)
    high = min(highest + 1 - first_position, length)
    if low >= high:
        return 0, 0
    return low // block_tokens, (high + block_tokens - 1) // block_tokens


@inner
def _run_blocks(job, blocks, tiles):
    least = max(1, _RUN_NBYTES // job[HEAD_NBYTES])
    runs = max(1, _MOST_CHUNKS // (job[KV_HEADS] * tiles))
    return max(least, (blocks + runs - 1) // runs)


@inner
def _cut(job, offsets, lengths, first_positions, query_positions, chunks, ends):
    """Fill the tables of chunks and of ends; with tables of no rows, only count chunks, ends and rows of parts."""
    counts = np.zeros(3, np.int64)
    all_rows = job[POSITIONS] * job[GROUP]
    tiles = (all_rows + TILE_ROWS - 1) // TILE_ROWS
    for sequence in range(len(lengths)):
        for head in range(job[KV_HEADS]):
            for first_row in range(0, all_rows, TILE_ROWS):
                rows = min(TILE_ROWS, all_rows - first_row)
                low, high = _blocks_seen(
                    job, query_positions[sequence], first_positions[sequence], lengths[sequence], first_row, rows
                )
                step = _run_blocks(job, high - low, tiles)
                if len(ends) > 0:
                    ends[counts[1], END_CHUNK] = counts[0]
                    ends[counts[1], END_CHUNKS] = max(1, (high - low + step - 1) // step)
                counts[1] += 1
                first = low
                while True:
                    if len(chunks) > 0:
                        chunk = chunks[counts[0]]
                        chunk[SEQUENCE], chunk[HEAD], chunk[FIRST_ROW], chunk[ROWS] = sequence, head, first_row, rows
                        chunk[FIRST_BLOCK], chunk[BLOCKS] = offsets[sequence] + first, min(step, high - first)
                        chunk[FIRST_TOKEN], chunk[PART] = first * job[BLOCK_TOKENS], counts[2]
                    counts[0] += 1
                    counts[2] += rows
                    first += step
                    if first >= high:
                        break
    return counts


@inner
def _heads_together(job, chunks):
    """How many heads of a run one thread goes through together: blocks are then read as they lie."""
    if job[POSITIONS] * job[GROUP] > IN_PLACE_ROWS:
        return 1
    for heads in range(job[KV_HEADS], 1, -1):
        if job[KV_HEADS] % heads == 0 and chunks >= heads * _LEAST_GROUPS * job[THREADS]:
            return heads
    return 1


@inner
def _gather(job, chunks, ends, groups):
    """Fill the table of groups; returns how many there are."""
    together = _heads_together(job, chunks)
    count = 0
    # Of each sequence as many runs for each head; without heads together, for each tile of rows.
    for first in range(0, len(ends), together):
        runs = ends[first, END_CHUNKS]
        for run in range(runs):
            groups[count, GROUP_CHUNK] = ends[first, END_CHUNK] + run
            groups[count, GROUP_STRIDE], groups[count, GROUP_CHUNKS] = runs, together
            count += 1
    return count


@inner
def _words(job, counts):
    """Words of the chunks, of the ends, of the groups, and of all of the scratch."""
    chunks, ends, groups = counts[0] * CHUNK_FIELDS, counts[1] * END_FIELDS, counts[0] * GROUP_FIELDS
    return chunks, ends, groups, chunks + ends + groups + 8 + counts[2] * job[PART_NBYTES] // 8


@inner
def _run(launcher, state, task, ending, job, counts, offsets, lengths, first_positions, query_positions, scratch):
    chunk_words, end_words, group_words, _ = _words(job, counts)
    group_start = chunk_words + end_words
    parts_start = group_start + group_words
    chunks = scratch[:chunk_words].reshape((counts[0], CHUNK_FIELDS))
    ends = scratch[chunk_words:group_start].reshape((counts[1], END_FIELDS))
    groups = scratch[group_start:parts_start].reshape((counts[0], GROUP_FIELDS))
    _cut(job, offsets, lengths, first_positions, query_positions, chunks, ends)
    job[CHUNKS], job[ENDS] = scratch.ctypes.data, scratch.ctypes.data + 8 * chunk_words
    job[GROUPS] = scratch.ctypes.data + 8 * group_start
    job[PARTS] = scratch.ctypes.data + (parts_start + 7) // 8 * 64
    launch_at(launcher, state, task, job.ctypes.data, _gather(job, counts[0], ends, groups))
    launch_at(launcher, state, ending, job.ctypes.data, counts[1])


@cache
def chunk_counter() -> Any:
    """Compiled count(job, offsets, lengths, first_positions, query_positions) → int64 [4].

    How many chunks, ends and rows of parts there are, and the bytes of scratch that `chunk_runner`'s function needs.
    """

    def count(job: Any, offsets: Any, lengths: Any, first_positions: Any, query_positions: Any) -> Any:
        none = np.empty((0, 1), np.int64)
        result = np.empty(4, np.int64)
        counts = _cut(job, offsets, lengths, first_positions, query_positions, none, none)
        for place in range(3):
            result[place] = counts[place]
        result[3] = 8 * _words(job, counts)[3]
        return result

    return entry(f"int64[::1]({_LISTS})")(count)


@cache
def chunk_runner() -> Any:
    """Compiled run(launcher, state, task, ending, counts, scratch, job, offsets, ...): attend.

    counts: of `chunk_counter`'s function. scratch: int64, aligned to 64 bytes.
    """

    def run(
        launcher: int, state: int, task: int, ending: int, counts: Any, scratch: Any, job: Any, offsets: Any,
        lengths: Any, first_positions: Any, query_positions: Any,
    ) -> None:  # fmt: skip
        _run(launcher, state, task, ending, job, counts, offsets, lengths, first_positions,
             query_positions, scratch)  # fmt: skip

    return entry(f"void(int64, int64, int64, int64, int64[::1], int64[::1], {_LISTS})")(run)
