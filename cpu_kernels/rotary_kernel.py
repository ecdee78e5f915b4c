# mypy: allow-untyped-defs
"""Kernel of `rotary`: a chunk is a number of (sequence, position) pairs with all their heads."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.simd import Elements, element_pointer, element_to_float32, float32_to_element, int64_pointer

(
    COS,
    SIN,
    ANGLE_BATCH_BYTES,  # from the angles of one sequence to those of the next; 0 where all share them
    ANGLE_ROW_BYTES,
    SECOND_ANGLES_BYTES,  # from the angle of a head's first half to that of its second; 0 where there is one for both
    POSITIONS,
    PAIRS,  # of a head that are rotated
    WIDTH,  # of a head
    ELEMENT_BYTES,
    ROWS,
    ROWS_PER_CHUNK,
    QUERY,
) = range(12)
# Fields of a tensor, first of the queries and then of the keys. Strides are bytes.
SOURCE, HEADS, BATCH_STRIDE, HEAD_STRIDE, POSITION_STRIDE, OUT, TENSOR_FIELDS = range(7)
KEY = QUERY + TENSOR_FIELDS
JOB_FIELDS = KEY + TENSOR_FIELDS

_ONE_THREAD_ELEMENTS = 1 << 15


@inner
def _rotate(elements, source, out, cos_address, sin_address, second, pairs, width, element_bytes):
    """Each product and the sum is rounded, as tensor operations on elements do."""
    low = carray(element_pointer(elements, source), (width,))
    high = carray(element_pointer(elements, source + pairs * element_bytes), (pairs,))
    out_low = carray(element_pointer(elements, out), (width,))
    out_high = carray(element_pointer(elements, out + pairs * element_bytes), (pairs,))
    cos = carray(element_pointer(elements, cos_address), (pairs,))
    sin = carray(element_pointer(elements, sin_address), (pairs,))
    cos_high = carray(element_pointer(elements, cos_address + second), (pairs,))
    sin_high = carray(element_pointer(elements, sin_address + second), (pairs,))
    for i in range(pairs):
        a, b = element_to_float32(elements, low[i]), element_to_float32(elements, high[i])
        first = float32_to_element(elements, a * element_to_float32(elements, cos[i]))
        turned = float32_to_element(elements, -b * element_to_float32(elements, sin[i]))
        total = element_to_float32(elements, first) + element_to_float32(elements, turned)
        out_low[i] = float32_to_element(elements, total)
        first = float32_to_element(elements, b * element_to_float32(elements, cos_high[i]))
        turned = float32_to_element(elements, a * element_to_float32(elements, sin_high[i]))
        total = element_to_float32(elements, first) + element_to_float32(elements, turned)
        out_high[i] = float32_to_element(elements, total)
    for i in range(2 * pairs, width):
        out_low[i] = low[i]


@inner
def run_chunk(elements, job_address, chunk):
    """Some positions."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    element_bytes, width = job[ELEMENT_BYTES], job[WIDTH]
    first = chunk * job[ROWS_PER_CHUNK]
    for row in range(first, min(first + job[ROWS_PER_CHUNK], job[ROWS])):
        sequence = row // job[POSITIONS]
        position = row - sequence * job[POSITIONS]
        angle = sequence * job[ANGLE_BATCH_BYTES] + position * job[ANGLE_ROW_BYTES]
        for which in range(2):
            tensor = job[QUERY + which * TENSOR_FIELDS : KEY + which * TENSOR_FIELDS]
            source = tensor[SOURCE] + sequence * tensor[BATCH_STRIDE] + position * tensor[POSITION_STRIDE]
            out = tensor[OUT] + row * tensor[HEADS] * width * element_bytes
            for head in range(tensor[HEADS]):
                _rotate(
                    elements,
                    source + head * tensor[HEAD_STRIDE],
                    out + head * width * element_bytes,
                    job[COS] + angle,
                    job[SIN] + angle,
                    job[SECOND_ANGLES_BYTES],
                    job[PAIRS],
                    width,
                    element_bytes,
                )


@cache
def rotary_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, job, chunk)

    return task_address(task)


_I64 = ", ".join(["int64"] * 25)


@entry(f"void({_I64})")
def run_rotary(
    launcher: int, state: int, task: int, element_bytes: int, batch: int, positions: int, width: int,
    cos: int, sin: int, angle_batch: int, angle_row: int, pairs: int, second_angles: int,
    q: int, q_heads: int, q_batch: int, q_head: int, q_position: int,
    k: int, k_heads: int, k_batch: int, k_head: int, k_position: int,
    q_out: int, k_out: int,
) -> None:  # fmt: skip
    """Rotate q and k [batch, heads, positions, width], strides in elements, into [batch, positions, heads, width]."""
    job = np.empty(JOB_FIELDS, np.int64)
    job[COS] = cos
    job[SIN] = sin
    job[ANGLE_BATCH_BYTES] = angle_batch * element_bytes
    job[ANGLE_ROW_BYTES] = angle_row * element_bytes
    job[SECOND_ANGLES_BYTES] = second_angles * element_bytes
    job[POSITIONS] = positions
    job[PAIRS] = pairs
    job[WIDTH] = width
    job[ELEMENT_BYTES] = element_bytes
    job[ROWS] = batch * positions
    for base, source, heads, per_batch, per_head, per_position, out in (
        (QUERY, q, q_heads, q_batch, q_head, q_position, q_out),
        (KEY, k, k_heads, k_batch, k_head, k_position, k_out),
    ):
        job[base + SOURCE] = source
        job[base + HEADS] = heads
        job[base + BATCH_STRIDE] = per_batch * element_bytes
        job[base + HEAD_STRIDE] = per_head * element_bytes
        job[base + POSITION_STRIDE] = per_position * element_bytes
        job[base + OUT] = out
    rows = batch * positions
    per_chunk = max(1, min(rows, _ONE_THREAD_ELEMENTS // ((q_heads + k_heads) * width)))
    job[ROWS_PER_CHUNK] = per_chunk
    launch(launcher, state, task, job, (rows + per_chunk - 1) // per_chunk)
