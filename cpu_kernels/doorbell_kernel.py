# mypy: allow-untyped-defs
"""The CPU's side of the doorbell: wait for a layer's request, compute its experts in place, answer.

A mailbox is memory that the CPU and an accelerator's stream both see. Its bell is two words, each written by one side
and cleared by the other: the stream writes layer + 1 to REQUEST, the server clears it, computes, and writes layer + 1
to REPLY, which the stream waits for and clears. Nothing counts up, so a captured graph rings with the same values in
every step. docs/gpu.md argues why no byte is read too early; `tests/devices/doorbell_model.py` checks it.

A request is served in three calls (`take`, `compute`, `answer`), so that a test can put anything between them.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cpu_kernels.atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    load_u32,
    pause,
    sem_init,
    store_u32,
    wait_semaphore,
    wake,
)
from cpu_kernels.jit import c_function, carray, entry, inner
from cpu_kernels.simd import float32_pointer, int64_pointer
from cpu_kernels.tape_kernel import WORDS, run_tape

# Bytes of a mailbox. What the two sides write lies in cache lines of their own.
REQUEST, REPLY, STATUS, CONTENT = 0, 128, 256, 384

# A status, written before the reply.
FINE, BAD_REQUEST, FAILED = range(3)

# Fields of the server, int64.
(
    MAILBOX,
    LAYERS,
    LAYER_TABLE,  # address of int64 [LAYERS, LAYER_FIELDS]
    PAIRS,
    SUM_COUNT,
    IDS,  # offsets in the mailbox
    WEIGHTS,
    SUMS,
    LAUNCHER,
    LAUNCHER_STATE,
    THREADS,
    SPINS,  # turns of the waiting loop before it naps
    NAP_US,
    MISSING,  # address of int64 [PAIRS]: experts that are nowhere
    FIELDS,
) = range(15)
# Those that several threads write, 128 bytes apart.
EXPECTED = 32  # requests that were announced and not answered
STOP = 48
ASLEEP = 64
WAKE = 72  # semaphore
SERVER_WORDS = 80

# Fields of a layer: its experts, their homes, and the tape that computes them, with its choice of experts and its sums.
EXPERTS, HOMES, TAPE, ROWS, TAPE_IDS, TAPE_WEIGHTS, TAPE_SUMS, LAYER_FIELDS = range(8)

# The home of an expert: an address in host memory, or one of these.
ELSEWHERE, NOWHERE = 0, -1

UNROUTED = -1
"""The id of a pair that nobody computes here."""

# What calls return instead of a layer or a number of experts.
NOTHING, STOPPED, BROKEN = -1, -2, -3

_usleep = c_function("usleep", types.int32, types.uint32)


@inner
def _fields(server):
    return carray(int64_pointer(server), (FIELDS,))


@inner
def _layer(fields, number):
    return carray(int64_pointer(fields[LAYER_TABLE] + 8 * LAYER_FIELDS * number), (LAYER_FIELDS,))


@inner
def _take(server):
    fields = _fields(server)
    mailbox = fields[MAILBOX]
    request = load_u32(mailbox + REQUEST)
    if request == 0:
        return NOTHING
    store_u32(mailbox + REQUEST, 0)
    number = request - 1
    if number < fields[LAYERS]:
        layer = _layer(fields, number)
        ids = carray(int64_pointer(mailbox + fields[IDS]), (fields[PAIRS],))
        weights = carray(float32_pointer(mailbox + fields[WEIGHTS]), (fields[PAIRS],))
        own_ids = carray(int64_pointer(layer[TAPE_IDS]), (fields[PAIRS],))
        own_weights = carray(float32_pointer(layer[TAPE_WEIGHTS]), (fields[PAIRS],))
        for pair in range(fields[PAIRS]):
            own_ids[pair] = ids[pair]
            own_weights[pair] = weights[pair]
    return number


@inner
def _divide(fields, layer):
    """Take out pairs that others compute; lists experts that are nowhere, in which case no pair is taken out."""
    ids = carray(int64_pointer(layer[TAPE_IDS]), (fields[PAIRS],))
    weights = carray(float32_pointer(layer[TAPE_WEIGHTS]), (fields[PAIRS],))
    homes = carray(int64_pointer(layer[HOMES]), (layer[EXPERTS],))
    missing = carray(int64_pointer(fields[MISSING]), (fields[PAIRS],))
    count = 0
    for pair in range(fields[PAIRS]):
        if ids[pair] == UNROUTED or weights[pair] == 0:
            continue
        if ids[pair] < 0 or ids[pair] >= layer[EXPERTS]:
            return BROKEN
        if homes[ids[pair]] == NOWHERE:
            missing[count] = ids[pair]
            count += 1
    if count == 0:
        for pair in range(fields[PAIRS]):
            if ids[pair] != UNROUTED and weights[pair] != 0 and homes[ids[pair]] == ELSEWHERE:
                ids[pair] = UNROUTED
    return count


@inner
def _compute(server, number):
    fields = _fields(server)
    if number >= fields[LAYERS]:
        return BROKEN
    layer = _layer(fields, number)
    found = _divide(fields, layer)
    if found == 0:
        tape = carray(int64_pointer(layer[TAPE]), (layer[ROWS], WORDS))
        run_tape(fields[LAUNCHER], fields[LAUNCHER_STATE], fields[THREADS], 0, tape, 0, layer[ROWS])
        sums = carray(float32_pointer(layer[TAPE_SUMS]), (fields[SUM_COUNT],))
        out = carray(float32_pointer(fields[MAILBOX] + fields[SUMS]), (fields[SUM_COUNT],))
        for i in range(fields[SUM_COUNT]):
            out[i] = sums[i]
    return found


@inner
def _answer(server, number, status):
    fields = _fields(server)
    mailbox = fields[MAILBOX]
    if status != FINE:
        out = carray(float32_pointer(mailbox + fields[SUMS]), (fields[SUM_COUNT],))
        for i in range(fields[SUM_COUNT]):
            out[i] = np.float32(np.nan)
        store_u32(mailbox + STATUS, status)
    # Lowered first: whoever sees the reply may announce what comes next.
    atomic_add(server + 8 * EXPECTED, -1)
    store_u32(mailbox + REPLY, number + 1)


@entry("int64(int64)")
def take(server: int) -> int:
    """Take the request that is there: its layer, or NOTHING. Its hidden states stay in the mailbox until `answer`."""
    return _take(server)  # type: ignore[no-any-return]


@entry("int64(int64, int64)")
def compute(server: int, layer: int) -> int:
    """Sums of the experts that are in host memory, to the mailbox.

    Returns:
        0, the number of pairs whose experts are nowhere (nothing was computed then), or BROKEN for a layer or an
        expert that there is not.
    """
    return _compute(server, layer)  # type: ignore[no-any-return]


@entry("void(int64, int64, int64)")
def answer(server: int, layer: int, status: int) -> None:
    """Let the stream go on. With a status other than FINE sums are NaN, and it stays until somebody clears it."""
    _answer(server, layer, status)


@inner
def _idle(server):
    """Spin a while for a request, then nap between two looks; with none announced sleep until one is."""
    fields = _fields(server)
    for _ in range(fields[SPINS]):
        if load_u32(fields[MAILBOX] + REQUEST) != 0 or atomic_load(server + 8 * STOP) != 0:
            return
        pause()
    if atomic_load(server + 8 * EXPECTED) > 0:
        _usleep(fields[NAP_US])
        return
    atomic_exchange(server + 8 * ASLEEP, 1)
    # What was announced before the flag was up woke nobody.
    news = atomic_load(server + 8 * EXPECTED) > 0 or atomic_load(server + 8 * STOP) != 0
    if not news or atomic_exchange(server + 8 * ASLEEP, 0) == 0:
        wait_semaphore(server + 8 * WAKE)


@entry("int64(int64)")
def serve(server: int) -> int:
    """Answer requests until one needs more than this: the layer whose experts are nowhere, or STOPPED."""
    while True:
        if atomic_load(server + 8 * STOP) != 0:
            return STOPPED
        layer = _take(server)
        if layer == NOTHING:
            _idle(server)
            continue
        found = _compute(server, layer)
        if found > 0:
            return layer  # type: ignore[no-any-return]
        _answer(server, layer, BAD_REQUEST if found == BROKEN else FINE)


@entry("int64(int64)")
def expected(server: int) -> int:
    """Requests that were announced and not answered."""
    return atomic_load(server + 8 * EXPECTED)  # type: ignore[no-any-return]


@entry("void(int64, int64)")
def announce(server: int, requests: int) -> None:
    """So many requests are about to come; wakes the server."""
    atomic_add(server + 8 * EXPECTED, requests)
    wake(server + 8 * ASLEEP, server + 8 * WAKE)


@entry("void(int64)")
def stop(server: int) -> None:
    """Let `serve` return."""
    atomic_exchange(server + 8 * STOP, 1)
    wake(server + 8 * ASLEEP, server + 8 * WAKE)


@entry("void(int64)")
def initialise(server: int) -> None:
    """Make the semaphore of a server whose other words are set."""
    sem_init(server + 8 * WAKE, 0, 0)
