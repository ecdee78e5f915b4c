"""Runs of chunks: together they are all chunks in order, the first are long and the last single."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpu_kernels.chunk_runs import chunks_of_run, count_runs
from cpu_kernels.jit import entry


@entry("int64(int64, int64, int64[:, ::1])")
def _write_runs(chunks: int, threads: int, bounds: Any) -> int:
    runs = count_runs(chunks, threads) if threads > 0 else chunks
    for run in range(runs):
        bounds[run, 0], bounds[run, 1] = chunks_of_run(run, chunks, threads)
    return runs


def _runs(chunks: int, threads: int) -> list[tuple[int, int]]:
    bounds = np.full((chunks + 1, 2), -1, np.int64)
    count = _write_runs(chunks, threads, bounds)
    return [(first, end) for first, end in bounds[:count].tolist()]


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7, 16, 96, 1000])
def test_runs_are_all_chunks_in_order(chunks: int, threads: int) -> None:
    runs = _runs(chunks, threads)
    assert [chunk for first, end in runs for chunk in range(first, end)] == list(range(chunks))
    lengths = [end - first for first, end in runs]
    assert lengths == sorted(lengths, reverse=True)
    assert all(length <= max(1, chunks // (2 * threads)) for length in lengths)


def test_without_threads_a_chunk_is_a_run() -> None:
    assert _runs(3, 0) == [(0, 1), (1, 2), (2, 3)]
