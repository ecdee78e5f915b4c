"""The disk without the runtime: plain loops of O_DIRECT reads and writes, the limit that the runtime is held to."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

PAGE_NBYTES = 4096
COPY_BLOCK_NBYTES = 16 << 20


@dataclass(frozen=True)
class Block:
    """A page-aligned range of a file."""

    file: int
    offset: int
    nbytes: int


def aligned_buffer(nbytes: int) -> memoryview:
    """Page-aligned anonymous memory, huge pages where possible, touched."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    view[::PAGE_NBYTES] = bytes(len(view[::PAGE_NBYTES]))
    return view


def read_blocks(paths: Sequence[Path], blocks: Iterable[Block], threads: int) -> float:
    """Seconds in which threads read all blocks with O_DIRECT, each thread into a buffer of its own."""
    work = list(blocks)
    largest = page_up(max(block.nbytes for block in work))
    buffers = [aligned_buffer(largest) for _ in range(threads)]
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    shared = iter(work)
    lock = threading.Lock()

    def read(buffer: memoryview) -> None:
        while True:
            with lock:
                block = next(shared, None)
            if block is None:
                return
            read_block(fds[block.file], block, buffer)

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
