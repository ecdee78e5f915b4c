# mypy: allow-untyped-defs
"""Several independent jobs as one: their chunks in one region of threads, without a wait between them.

A table is int64: how many jobs there are, then for each (end of its chunks among all, task, job).
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.launch import launch_at
from cpu_kernels.simd import int64_pointer
from cpu_kernels.threads_kernel import call_task

JOB_WORDS = 3
_END, _TASK, _JOB = range(JOB_WORDS)


@inner
def enter_job(table, task, job, chunks):
    """Add a job to a table with room for it; an empty one starts with 0."""
    count = table[0]
    at = 1 + JOB_WORDS * count
    table[at + _END] = chunks if count == 0 else table[at - JOB_WORDS + _END] + chunks
    table[at + _TASK], table[at + _JOB] = task, job
    table[0] = count + 1


@inner
def launch_jobs(launcher, state, task, table):
    """Run all jobs of a table, which the caller keeps alive; task: `joint_task`'s address."""
    launch_at(launcher, state, task, table.ctypes.data, table[1 + JOB_WORDS * (table[0] - 1) + _END])


@inner
def _run_chunk(table_address, chunk):
    count = carray(int64_pointer(table_address), (1,))[0]
    jobs = carray(int64_pointer(table_address + 8), (count, JOB_WORDS))
    first, index = 0, 0
    while chunk >= jobs[index, _END]:
        first = jobs[index, _END]
        index += 1
    call_task(jobs[index, _TASK], jobs[index, _JOB], chunk - first)


@cache
def joint_task() -> int:
    """Address of the compiled task void(int64 table, int64 chunk)."""

    def task(table: int, chunk: int) -> None:
        _run_chunk(table, chunk)

    return task_address(task)
