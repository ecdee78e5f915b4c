# mypy: allow-untyped-defs
"""The MoE rows of a tape: choosing experts, and computing those that are at hand."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels import expert_mlp_jobs, packed_jobs, routing_kernel
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.launch import launch_at
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_pointer,
    float32_to_element,
    int64_pointer,
)
from cpu_kernels.threads_kernel import call_task
from cpu_kernels.top_k_kernel import choose_top_k, weigh_top_k

# Fields of a job of choosing.
(
    LOGITS,
    EXPERTS,
    TOKENS,
    TOP_K,
    IDS,
    WEIGHTS,
    RENORMALISE,
    ROUNDED,
    SHARES,
    ELEMENT_BYTES,
    CLEAR,  # written: 1 if the choice is clear for every token
    QUEUE,  # address of int64 [experts], scratch for the order of equals; 0 where torch's is not known
    CHOICE_FIELDS,
) = range(13)

# Fields of a job that adds weighted sums to the residual stream.
A, SUMS, OUT, COUNT, ADD_FIELDS = range(5)


@inner
def _token(elements, job, token):
    """Logits, ids, shares and weights of one token."""
    experts, top_k = job[EXPERTS], job[TOP_K]
    logits = carray(element_pointer(elements, job[LOGITS] + token * experts * job[ELEMENT_BYTES]), (experts,))
    ids = carray(int64_pointer(job[IDS] + 8 * token * top_k), (top_k,))
    shares = carray(float32_pointer(job[SHARES] + 4 * token * experts), (experts,))
    weights = carray(float32_pointer(job[WEIGHTS] + 4 * token * top_k), (top_k,))
    return logits, ids, shares, weights


@inner
def _choose(elements, job_address):
    job = carray(int64_pointer(job_address), (CHOICE_FIELDS,))
    job[CLEAR] = 1
    queue = carray(int64_pointer(job[QUEUE]), (job[EXPERTS] if job[QUEUE] else 0,))
    for token in range(job[TOKENS]):
        logits, ids, shares, _ = _token(elements, job, token)
        if not choose_top_k(elements, logits, ids, shares, queue):
            job[CLEAR] = 0


@inner
def _weigh(elements, job_address):
    job = carray(int64_pointer(job_address), (CHOICE_FIELDS,))
    for token in range(job[TOKENS]):
        _, ids, shares, weights = _token(elements, job, token)
        weigh_top_k(elements, ids, shares, weights, job[RENORMALISE] > 0, job[ROUNDED] > 0)


@cache
def choice_task(elements: Elements) -> int:
    """Address of the compiled task that chooses, void(int64 job, int64 unused)."""

    def task(job: int, chunk: int) -> None:
        _choose(elements, job)

    return task_address(task)


@cache
def weighing_task(elements: Elements) -> int:
    """Address of the compiled task that weighs what was chosen, void(int64 job, int64 unused)."""

    def task(job: int, chunk: int) -> None:
        _weigh(elements, job)

    return task_address(task)


@inner
def _add_sums(elements, job_address):
    job = carray(int64_pointer(job_address), (ADD_FIELDS,))
    count = job[COUNT]
    a = carray(element_pointer(elements, job[A]), (count,))
    sums = carray(float32_pointer(job[SUMS]), (count,))
    out = carray(element_pointer(elements, job[OUT]), (count,))
    for i in range(count):
        rounded = element_to_float32(elements, float32_to_element(elements, sums[i]))
        out[i] = float32_to_element(elements, element_to_float32(elements, a[i]) + rounded)


@cache
def add_sums_task(elements: Elements) -> int:
    """Address of the compiled task out = round(a + round(sums)), void(int64 job, int64 unused)."""

    def task(job: int, chunk: int) -> None:
        _add_sums(elements, job)

    return task_address(task)


@inner
def choose(row):
    """Run a row of choosing; returns whether the choice is clear."""
    address = row.ctypes.data + 16
    call_task(row[1], address, 0)
    return carray(int64_pointer(address), (CHOICE_FIELDS,))[CLEAR] > 0


@inner
def _group(row, pairs):
    """Pairs by expert, and the addresses of the experts' bundles; outputs of pairs that are dropped are cleared.

    Experts without an address, and their pairs' outputs, are left alone.
    """
    count, top_k, hidden = row[6], row[8], row[10]
    ids = carray(int64_pointer(row[4]), (pairs,))
    weights = carray(float32_pointer(row[5]), (pairs,))
    table = carray(int64_pointer(row[14]), (routing_kernel.TABLE_ROWS, pairs + 1))
    experts, _, dropped = routing_kernel.group_pairs(ids, weights, count, top_k, table)
    for i in range(dropped):
        output = carray(float32_pointer(row[12] + 4 * hidden * table[routing_kernel.DROPPED, i]), (hidden,))
        for j in range(hidden):
            output[j] = np.float32(0)
    addresses = carray(int64_pointer(row[3]), (count,))
    here, moved = 0, 0
    first = table[routing_kernel.OFFSETS, 0]
    for i in range(experts):
        end = table[routing_kernel.OFFSETS, i + 1]
        address = addresses[table[routing_kernel.EXPERTS, i]]
        if address:
            for pair in range(first, end):
                table[routing_kernel.ROWS, moved] = table[routing_kernel.ROWS, pair]
                table[routing_kernel.TOKENS, moved] = table[routing_kernel.TOKENS, pair]
                moved += 1
            table[routing_kernel.EXPERTS, here] = address
            here += 1
            table[routing_kernel.OFFSETS, here] = moved
        first = end
    return table, here, moved


@inner
def run_experts(launcher, state, threads, row):
    """Run a row of experts whose elements are not packed.

    Words: 1 address of the shape, 2 task, 3 addresses of bundles, 4 ids, 5 weights, 6 experts, 7 tokens, 8 top-k,
    9 x, 10 hidden, 11 activation, 12 outputs fp32 [pairs, hidden], 13 bytes of a row of x, 14 table of grouping,
    15 workspace, 16 its words.
    """
    pairs = row[7] * row[8]
    table, experts, kept = _group(row, pairs)
    shape = carray(int64_pointer(row[1]), (expert_mlp_jobs.SHAPE_FIELDS,))
    workspace = carray(int64_pointer(row[15]), (row[16],))
    expert_mlp_jobs.prepare(
        workspace, shape, row[2], table[routing_kernel.EXPERTS, :experts],
        table[routing_kernel.OFFSETS, : experts + 1], table[routing_kernel.TOKENS, :kept], row[9], row[13], row[7],
        table[routing_kernel.ROWS, :kept], row[12], 4 * row[10], pairs, True, True, row[11], threads,
    )  # fmt: skip
    for phase in range(2):
        at = expert_mlp_jobs.PHASES + 3 * phase
        launch_at(launcher, state, workspace[at], workspace[at + 1], workspace[at + 2])


@inner
def run_packed_experts(launcher, state, threads, row):
    """Run a row of packed experts; words as for `run_experts`, but 2 address of the tasks, 17 number of x's type."""
    pairs = row[7] * row[8]
    table, experts, kept = _group(row, pairs)
    shape = carray(int64_pointer(row[1]), (packed_jobs.SHAPE_FIELDS,))
    tasks = carray(int64_pointer(row[2]), (2,))
    workspace = carray(int64_pointer(row[15]), (row[16],))
    packed_jobs.prepare_experts(
        workspace, shape, tasks, row[17], table[routing_kernel.EXPERTS, :experts],
        table[routing_kernel.OFFSETS, : experts + 1], table[routing_kernel.TOKENS, :kept], row[9], row[13], row[7],
        table[routing_kernel.ROWS, :kept], row[12], 4 * row[10], pairs, True, True, row[11], threads,
    )  # fmt: skip
    for phase in range(3):
        at = packed_jobs.PHASES + 3 * phase
        launch_at(launcher, state, workspace[at], workspace[at + 1], workspace[at + 2])
