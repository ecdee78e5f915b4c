# mypy: allow-untyped-defs
"""The order in which torch's `topk` on the CPU leaves equal numbers.

It depends on how the k largest are found: torch calls `std::nth_element` on pairs of number and index, which are
compared by number alone, and `std::sort` on what came before the k-th (ATen/native/TopKImpl.h). Both go the way of the
GNU C++ library here: introselect with the median of three as pivot (Musser, 1997), then insertion. Another library may
leave equals in another order; `torch_order.orders_as_torch` compares before anybody relies on it.
"""

from __future__ import annotations

from cpu_kernels.jit import inner

# std::sort goes by insertion alone up to here.
_MOST_SORTED = 16
# From so many numbers for each that is wanted, torch takes `std::partial_sort`.
_PARTIAL_SORT_FROM = 64


@inner
def _swap(queue, a, b):
    kept = queue[a]
    queue[a] = queue[b]
    queue[b] = kept


@inner
def _before(shares, queue, a, b):
    return shares[queue[a]] > shares[queue[b]]


@inner
def _median(shares, queue, a, b, c):
    """The place of the median of three."""
    if _before(shares, queue, a, b):
        if _before(shares, queue, b, c):
            return b
        return c if _before(shares, queue, a, c) else a
    if _before(shares, queue, a, c):
        return a
    return c if _before(shares, queue, b, c) else b


@inner
def _partition(shares, queue, first, last):
    """Numbers before `first`'s to the front of (first, last); returns where the others start."""
    low, high = first + 1, last
    while True:
        while _before(shares, queue, low, first):
            low += 1
        high -= 1
        while _before(shares, queue, first, high):
            high -= 1
        if low >= high:
            return low
        _swap(queue, low, high)
        low += 1


@inner
def _insertion_sort(shares, queue, first, last):
    for place in range(first + 1, last):
        moved = queue[place]
        hole = place
        while hole > first and shares[moved] > shares[queue[hole - 1]]:
            queue[hole] = queue[hole - 1]
            hole -= 1
        queue[hole] = moved


@inner
def order_as_torch(shares, ids, queue):
    """The indices of the k largest of n numbers, none of them NaN.

    Args:
        shares: fp32 [n].
        ids: int64 [k], written; k at most n.
        queue: int64 [n], scratch.

    Returns:
        Whether there is an answer: not where torch would go another way.
    """
    count, k = len(shares), len(ids)
    if _PARTIAL_SORT_FROM * k <= count or k - 1 > _MOST_SORTED:
        return False
    for i in range(count):
        queue[i] = i
    turns = 0
    while (2 << turns) <= count:
        turns += 1
    turns *= 2
    first, last = 0, count
    while last - first > 3:
        if turns == 0:
            return False
        turns -= 1
        _swap(queue, first, _median(shares, queue, first + 1, first + (last - first) // 2, last - 1))
        cut = _partition(shares, queue, first, last)
        if cut <= k - 1:
            first = cut
        else:
            last = cut
    _insertion_sort(shares, queue, first, last)
    _insertion_sort(shares, queue, 0, k - 1)
    for place in range(k):
        ids[place] = queue[place]
    return True
