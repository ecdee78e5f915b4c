"""The disk without the runtime: plain loops of O_DIRECT reads and writes, the limit that the runtime is held to."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

PAGE_NBYTES = 4096
HUGE_PAGE_NBYTES = 2 << 20
COPY_BLOCK_NBYTES = 16 << 20


@dataclass(frozen=True)
class Block:
    """A page-aligned range of a file."""

    file: int
    offset: int
    nbytes: int


def aligned_buffer(nbytes: int, *, touched: bool = True) -> memoryview:
    """Anonymous memory that starts with a huge page: direct reads into small pages run at half the speed."""
    memory = mmap.mmap(-1, page_up(nbytes) + 2 * HUGE_PAGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, dtype=np.uint8)
    start = -view.ctypes.data % HUGE_PAGE_NBYTES
    if touched:
        view[start : start + nbytes : PAGE_NBYTES] = 0
    return memoryview(view[start : start + page_up(nbytes)])  # type: ignore[arg-type]


def read_blocks(paths: Sequence[Path], blocks: Iterable[Block], threads: int, *, keep: bool = False) -> float:
    """Seconds in which threads read all blocks with O_DIRECT.

    Args:
        paths: the files.
        blocks: of them, read in this order.
        threads: reads in flight.
        keep: every block into memory of its own, which is new, as a loader has to; otherwise each thread reads into
            the same buffer again and again.
    """
    work = list(blocks)
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    largest = page_up(max(block.nbytes for block in work))
    sizes = [page_up(block.nbytes) if keep else 0 for block in work]
    starts = list(itertools.accumulate(sizes, initial=0))
    kept = aligned_buffer(max(starts[-1], 1), touched=False)
    buffers = [aligned_buffer(largest) for _ in range(threads)]
    shared = iter(zip(work, starts, strict=False))
    lock = threading.Lock()

    def read(buffer: memoryview) -> None:
        while True:
            with lock:
                block, start = next(shared, (None, 0))
            if block is None:
                return
            target = kept[start : start + page_up(block.nbytes)] if keep else buffer
            read_block(fds[block.file], block, target)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: None, range(threads)))
            before = perf_counter()
            list(pool.map(read, buffers))
            return perf_counter() - before
    finally:
        for fd in fds:
            os.close(fd)


def read_block(fd: int, block: Block, buffer: memoryview) -> None:
    """Fill the first bytes of `buffer`, which holds whole pages; the last block of a file may end within one."""
    done = 0
    while done < block.nbytes:
        count = os.preadv(fd, [buffer[done : page_up(block.nbytes)]], block.offset + done)
        if count == 0:
            raise EOFError(f"the file ends at {block.offset + done}, expected {block.nbytes} bytes at {block.offset}")
        done += count


def blocks_of(paths: Sequence[Path], block_nbytes: int) -> list[Block]:
    """The files in blocks, in order; the last of each may be smaller."""
    return [
        Block(index, offset, min(block_nbytes, size - offset))
        for index, size in enumerate(path.stat().st_size for path in paths)
        for offset in range(0, size, block_nbytes)
    ]


def page_up(nbytes: int) -> int:
    """The next multiple of a page."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def copy_files(sources: Sequence[Path], target: Path, *, skipped_nbytes: int, overlapped: bool) -> float:
    """Seconds to read `sources` once and write all but `skipped_nbytes` of them once, durably.

    Args:
        sources: read with O_DIRECT in blocks of 16 MiB.
        target: a new file, written with O_DIRECT, then fsynced; removed afterwards.
        skipped_nbytes: read and not written, from the start on, in whole blocks.
        overlapped: write a block while the next is read; else one after the other.
    """
    blocks = blocks_of(sources, COPY_BLOCK_NBYTES)
    skip = skipped_nbytes // COPY_BLOCK_NBYTES
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in sources]
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    free: queue.Queue[memoryview] = queue.Queue()
    for _ in range(2):
        free.put(aligned_buffer(COPY_BLOCK_NBYTES))

    def write(buffer: memoryview, nbytes: int, offset: int) -> None:
        try:
            done = 0
            while done < nbytes:
                done += os.pwrite(out, buffer[done:nbytes], offset + done)
        finally:
            free.put(buffer)

    def filled() -> Iterator[tuple[memoryview, int, int]]:
        for index, block in enumerate(blocks):
            buffer = free.get()
            read_block(fds[block.file], block, buffer)
            if index < skip:
                free.put(buffer)
            else:
                yield buffer, page_up(block.nbytes), (index - skip) * COPY_BLOCK_NBYTES

    try:
        before = perf_counter()
        if overlapped:
            with ThreadPoolExecutor(1) as pool:
                for future in [pool.submit(write, *item) for item in filled()]:
                    future.result()
        else:
            for item in filled():
                write(*item)
        os.fsync(out)
        return perf_counter() - before
    finally:
        for fd in (*fds, out):
            os.close(fd)
        target.unlink()
