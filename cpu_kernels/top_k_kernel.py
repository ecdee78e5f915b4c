# mypy: allow-untyped-defs
"""A router's choice: softmax of its logits in fp32, the k largest, their weights."""

from __future__ import annotations

import numpy as np

from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.jit import inner
from cpu_kernels.simd import element_to_float32, float32_to_element
from cpu_kernels.torch_order_kernel import order_as_torch

# Below this the exponential is no normal fp32.
_LOWEST = np.float32(-87.3)


@inner
def choose_top_k(elements, logits, ids, shares, queue):
    """One token's experts, by falling probability.

    Args:
        elements: type of the logits.
        logits: [E].
        ids: int64 [k], written.
        shares: fp32 [E], written: exp(logit - largest logit), the probabilities but for their sum.
        queue: int64 [E], scratch for the order of equals; empty where torch's is not known.

    Returns:
        Whether the choice is clear. If one is NaN, it is not; if two of the k + 1 largest are equal, only where the
        order in which torch leaves them is known.
    """
    count, k = len(logits), len(ids)
    largest = element_to_float32(elements, logits[0])
    for i in range(count):
        value = element_to_float32(elements, logits[i])
        shares[i] = value
        largest = max(largest, value)
    for i in range(count):
        below = shares[i] - largest
        # The kernel's exponential of a NaN is a number, and that of -inf not zero.
        if below >= _LOWEST:
            shares[i] = exp_float32(below)
        elif below < _LOWEST:
            shares[i] = np.float32(0)
        else:
            shares[i] = below
    finite = True
    for i in range(count):
        finite = finite and not np.isnan(shares[i])
    before = np.float32(np.inf)
    for place in range(k):
        best, chosen, equal = np.float32(-1), -1, 0
        for i in range(count):
            share = shares[i]
            if share < before:
                if share > best:
                    best, chosen, equal = share, i, 1
                elif share == best:
                    equal += 1
        if not finite:
            return False
        if equal != 1:
            return len(queue) > 0 and order_as_torch(shares, ids, queue)
        ids[place] = chosen
        before = best
    return True


@inner
def weigh_top_k(elements, ids, shares, weights, renormalise, rounded):
    """The weights of one token's experts, fp32 [k]: their probabilities, divided by the sum over the k if
    `renormalise`, then rounded to elements if `rounded`; shares: as `choose_top_k` leaves them.
    """
    total = np.float32(0)
    for i in range(len(shares)):
        total += shares[i]
    for place in range(len(ids)):
        weights[place] = shares[ids[place]] / total
    if renormalise:
        total = np.float32(0)
        for place in range(len(ids)):
            total += weights[place]
        for place in range(len(ids)):
            weights[place] /= total
    if rounded:
        for place in range(len(ids)):
            weights[place] = element_to_float32(elements, float32_to_element(elements, weights[place]))
