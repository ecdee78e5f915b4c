# mypy: allow-untyped-defs
"""Runs of consecutive chunks that a thread takes together, where all chunks cost about the same.

A thread that goes on with the chunk behind its own has asked for that chunk's weights already and writes beside what it
wrote last; one that takes every other chunk starts cold each time, and shares cache lines with its neighbours. So the
first runs are long, each a part of what is left, and the last are single chunks, over which threads that are not
equally fast come out even: guided self-scheduling (Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

from cpu_kernels.jit import inner


@inner
def _length(left, threads):
    return max(1, left // (2 * threads))


@inner
def count_runs(chunks, threads):
    """Runs that so many chunks make for a number of threads."""
    runs, left = 0, chunks
    while left > 0:
        left -= _length(left, threads)
        runs += 1
    return runs


@inner
def chunks_of_run(run, chunks, threads):
    """(first chunk, end) of a run below `count_runs`; threads 0: each chunk is a run of its own."""
    if threads == 0:
        return run, run + 1
    left = chunks
    for _ in range(run):
        left -= _length(left, threads)
    return chunks - left, chunks - left + _length(left, threads)
