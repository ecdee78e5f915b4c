"""Threads that write blocks to disk while the model computes."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import xxhash

from offload.errors import ClosedError
from offload.kv.slots import view
from offload.kv.spill_file import SpillFile


class WriteJob:
    """One block on its way to disk, whose bytes must stay as they are until `finished`.

    Attributes:
        checksum: xxh3-64 of the bytes, once finished.
        error: what went wrong, None where nothing did.
    """

    __slots__ = ("address", "checksum", "error", "finished", "nbytes", "offset")

    def __init__(self, address: int, nbytes: int, offset: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.offset = offset
        self.checksum = 0
        self.finished = False
        self.error: BaseException | None = None


class _Jobs:
    """What the threads share; holds no reference to the engine, so that one can be collected."""

    def __init__(self, file: SpillFile) -> None:
        self.file = file
        self.waiting: deque[WriteJob] = deque()
        self.running = 0
        self.closed = False
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.done = threading.Condition(self.lock)
        self.threads: list[threading.Thread] = []
        self.process = os.getpid()

    def close(self) -> None:
        if os.getpid() != self.process:
            # A forked child: the lock may have been held, and the threads are the parent's.
            return
        with self.lock:
            self.closed = True
            while self.waiting:
                job = self.waiting.popleft()
                job.error, job.finished = ClosedError("closed before it was written"), True
            self.work.notify_all()
            self.done.notify_all()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()


def _serve(jobs: _Jobs) -> None:
    while True:
        with jobs.lock:
            while not jobs.waiting and not jobs.closed:
                jobs.work.wait()
            if not jobs.waiting:
                return
            job = jobs.waiting.popleft()
            jobs.running += 1
        try:
            data = view(job.address, job.nbytes)
            job.checksum = xxhash.xxh3_64_intdigest(data)
            jobs.file.write(job.offset, data)
        except BaseException as error:  # noqa: BLE001 - carried to whoever needs the block's memory
            job.error = error
        with jobs.lock:
            job.finished = True
            jobs.running -= 1
            jobs.done.notify_all()


class WriteBack:
    """Writes blocks in the order in which they are handed in, several at once."""

    def __init__(self, file: SpillFile, threads: int) -> None:
        self._jobs = _Jobs(file)
        self._thread_count = threads
        self._finalizer = weakref.finalize(self, self._jobs.close)

    def submit(self, address: int, nbytes: int, offset: int) -> WriteJob:
        """Queue one block; returns at once.

        Raises:
            ClosedError: after `close()`.
            RuntimeError: the system gives no thread to write with.
        """
        job = WriteJob(address, nbytes, offset)
        jobs = self._jobs
        with jobs.lock:
            if jobs.closed:
                raise ClosedError("the model's runtime was closed; load the model again")
            while len(jobs.threads) < self._thread_count:
                thread = threading.Thread(
                    target=_serve, args=(jobs,), name=f"kv-writer-{len(jobs.threads)}", daemon=True
                )
                thread.start()
                jobs.threads.append(thread)
            jobs.waiting.append(job)
            jobs.work.notify()
        return job

    def wait(self, job: WriteJob) -> None:
        """Return when the job is finished, whatever its outcome."""
        with self._jobs.lock:
            while not job.finished:
                self._jobs.done.wait()

    def wait_for_all(self) -> None:
        """Return when nothing is queued or being written."""
        with self._jobs.lock:
            while self._jobs.waiting or self._jobs.running:
                self._jobs.done.wait()

    def close(self) -> None:
        """Finish what is being written, drop the rest. May be called again."""
        self._finalizer()
