# mypy: allow-untyped-calls
"""Grouping a router's choice by expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.jit import entry

# Rows of the table that `group_pairs` fills.
EXPERTS, OFFSETS, ROWS, TOKENS, DROPPED, TABLE_ROWS = range(6)


@entry("UniTuple(int64, 3)(int64[::1], float32[::1], int64, int64, int64[:, ::1])")
def group_pairs(ids: Any, weights: Any, expert_count: int, top_k: int, table: Any) -> tuple[int, int, int]:
    """Sort pairs by expert, ascending, those of one expert by row.

    Pairs of weight 0 and of experts that are not there are dropped.

    Args:
        ids: int64 [P], the expert of each pair.
        weights: fp32 [P]; those of dropped pairs are set to 0.
        expert_count: experts are 0 to here, exclusively.
        top_k: pairs of a token.
        table: int64 [TABLE_ROWS, P + 1], filled with the experts that have pairs, where the pairs of each begin and the
            last end, rows and tokens of the pairs, and rows of dropped pairs.

    Returns:
        How many experts, pairs and dropped pairs there are.
    """
    starts = np.zeros(expert_count + 1, np.int64)
    dropped = 0
    for row in range(len(ids)):
        expert = ids[row]
        if expert < 0 or expert >= expert_count or weights[row] == 0:
            table[DROPPED, dropped] = row
            dropped += 1
        else:
            starts[expert + 1] += 1
    experts = 0
    table[OFFSETS, 0] = 0
    for expert in range(expert_count):
        if starts[expert + 1] > 0:
            table[EXPERTS, experts] = expert
            experts += 1
            table[OFFSETS, experts] = table[OFFSETS, experts - 1] + starts[expert + 1]
        starts[expert + 1] += starts[expert]
    for row in range(len(ids)):
        expert = ids[row]
        if expert < 0 or expert >= expert_count or weights[row] == 0:
            weights[row] = 0
        else:
            place = starts[expert]
            starts[expert] = place + 1
            table[ROWS, place] = row
            table[TOKENS, place] = row // top_k
    return experts, len(ids) - dropped, dropped
