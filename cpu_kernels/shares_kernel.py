# mypy: allow-untyped-defs
"""Kernel of `add_shares`."""

from __future__ import annotations

import numpy as np

from cpu_kernels.jit import entry

_MINUS_INFINITY = np.float32(-np.inf)


@entry("void(float32[:, :, :], float64, float64[:, :])")
def add_shares_of_parts(lse, weight, into):
    """See `add_shares`; lse: [B, parts, rows]."""
    sequences, parts, rows = lse.shape
    for sequence in range(sequences):
        for row in range(rows):
            largest = _MINUS_INFINITY
            for part in range(parts):
                largest = max(largest, lse[sequence, part, row])
            # A query that sees nothing has no share.
            if largest == _MINUS_INFINITY:
                continue
            total = 0.0
            for part in range(parts):
                total += np.exp(lse[sequence, part, row] - largest)
            for part in range(parts):
                share = np.exp(lse[sequence, part, row] - largest) / total
                into[sequence, part] += weight * share
