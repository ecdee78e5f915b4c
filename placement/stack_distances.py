"""Stack distances of a sequence of requests: how many other keys were used since a key's last use.

A least-recently-used cache finds a request if its distance is below the number of slots (Mattson and others,
"Evaluation techniques for storage hierarchies", 1970), so one count serves all sizes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

FIRST = -1
"""The distance of a request that is its key's first."""

_MOST_PAIRS = 1 << 22


def stack_distances(keys: npt.ArrayLike, steps: npt.ArrayLike | None = None) -> IntArray:
    """int64 [n]: for each request, distinct other keys needed since its key's last use; FIRST where there is none.

    O(n log^2 n): a key is distinct in a window if its own last use lies before it, so what counts is how many earlier
    requests have a last use no later than this one's.

    Args:
        keys: integers [n] in the order of use.
        steps: integers, ascending from 0, where steps begin whose requests are looked up together: a request's distance
            counts to the beginning of its step. No key is twice in a step. None for every request by itself.
    """
    keys = np.asarray(keys, dtype=np.int64)
    before = _previous(keys)
    distances = _earlier_at_most(before) - (before + 1)
    if steps is not None:
        distances -= _within_steps(before, np.asarray(steps, dtype=np.int64))
    return np.where(before < 0, FIRST, distances)


def _previous(keys: IntArray) -> IntArray:
    """The index of each key's last use before, -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    before = np.full(len(keys), -1, dtype=np.int64)
    same = keys[order[1:]] == keys[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _earlier_at_most(values: IntArray) -> IntArray:
    """For each i, how many j < i have values[j] <= values[i]: halves of blocks against each other, all blocks at once.

    Args:
        values: -1 to n - 1.
    """
    n = len(values)
    size = 1 << max(n - 1, 0).bit_length()
    padded = np.full(size, n, dtype=np.int64)
    padded[:n] = values
    counts = np.zeros(size, dtype=np.int64)
    width = 1
    while width < size:
        halves = padded.reshape(-1, 2, width)
        number = np.arange(len(halves), dtype=np.int64)[:, None]
        left = np.sort(halves[:, 0], axis=1) + number * (n + 2)
        right = halves[:, 1] + number * (n + 2)
        found = np.searchsorted(left.reshape(-1), right.reshape(-1), side="right").reshape(right.shape)
        counts.reshape(-1, 2, width)[:, 1] += found - number * width
        width *= 2
    return counts[:n]


def _within_steps(before: IntArray, steps: IntArray) -> IntArray:
    """For each i, how many earlier j of its step have before[j] <= before[i]."""
    found = np.zeros(len(before), dtype=np.int64)
    sizes = np.diff(steps, append=len(before))
    for size in np.unique(sizes[sizes > 1]).tolist():
        starts = steps[sizes == size]
        earlier = np.tri(size, k=-1, dtype=bool)
        for part in np.array_split(starts, 1 + len(starts) * size * size // _MOST_PAIRS):
            places = part[:, None] + np.arange(size)
            values = before[places]
            found[places] = ((values[:, None, :] <= values[:, :, None]) & earlier).sum(axis=2)
    return found
