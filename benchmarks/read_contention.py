"""Whether this machine reads beside computing threads, or instead of them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep

from benchmarks.harness import Row, Spread
from benchmarks.raw_io import Block, read_blocks

_HASHED_NBYTES = 1 << 18


def contention(paths: Sequence[Path], blocks: Sequence[Block], rounds: int) -> list[Row]:
    """How fast threads compute and one thread reads, alone and beside each other.

    Computing is hashing what lies in a core's own cache, so that memory is not what they share; a virtual disk that
    takes a core of the machine below shows as computing that goes slower.

    Args:
        paths: files.
        blocks: of them, read with O_DIRECT by one thread.
        rounds: of each row.
    """
    nbytes = sum(block.nbytes for block in blocks)
    cores = len(os.sched_getaffinity(0))
    rows: list[Row] = []
    for threads in dict.fromkeys((1, cores)):
        alone, beside, read_alone, read_beside = [], [], [], []
        for _ in range(rounds):
            seconds = read_blocks(paths, blocks, 1)
            read_alone.append(nbytes / seconds / 1e9)
            with _Hashing(threads) as hashing:
                sleep(seconds)
                alone.append(hashing.bytes_per_s() / 1e9)
                read_beside.append(nbytes / read_blocks(paths, blocks, 1) / 1e9)
                beside.append(hashing.bytes_per_s() / 1e9)
        rows.append(
            {
                "computing threads": threads,
                "cores": cores,
                "hashed alone, GB/s": Spread.of(alone),
                "beside a read, GB/s": Spread.of(beside),
                "read alone, GB/s": Spread.of(read_alone),
                "beside computing, GB/s": Spread.of(read_beside),
            }
        )
    return rows


class _Hashing:
    """Threads that hash until they are told to stop; hashing holds no GIL."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._counts = [0] * threads
        self._stop = threading.Event()
        self._since = (perf_counter(), 0)

    def __enter__(self) -> _Hashing:
        for thread in range(len(self._counts)):
            self._pool.submit(self._hash, thread)
        self._since = (perf_counter(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def _hash(self, thread: int) -> None:
        data = bytes(_HASHED_NBYTES)
        while not self._stop.is_set():
            hashlib.sha256(data)
            self._counts[thread] += 1

    def bytes_per_s(self) -> float:
        """Of all threads, since this was asked last."""
        now, count = perf_counter(), sum(self._counts)
        before, counted = self._since
        self._since = (now, count)
        return (count - counted) * _HASHED_NBYTES / (now - before)
