"""A link from timings of copies by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Copies(NamedTuple):
    """Copies of one size: bytes and seconds of one of them."""

    nbytes: int
    seconds: float


def fit_link(copies: Sequence[Copies]) -> tuple[float, float]:
    """(latency_s, bytes_per_s) of seconds = latency_s + nbytes / bytes_per_s, neither below zero.

    Least squares of relative errors: small copies count as much as large ones.

    Args:
        copies: of two sizes at least.

    Raises:
        ValueError: fewer sizes, or copies that take no time.
    """
    if len({one.nbytes for one in copies}) < 2 or min(one.seconds for one in copies) <= 0:
        raise ValueError(f"a link needs copies of two sizes that take time, not {list(copies)}")
    # seconds = a + b nbytes, each equation divided by its seconds: 1 = a u + b v.
    u = [1 / one.seconds for one in copies]
    v = [one.nbytes / one.seconds for one in copies]
    uu, uv, vv = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    latency_s = (sum(u) * vv - sum(v) * uv) / determinant
    per_byte = (sum(v) * uu - sum(u) * uv) / determinant
    largest = max(copies)
    if latency_s < 0:
        return 0.0, vv / sum(v)
    if per_byte <= 0:
        # Copies of every size take alike: what is known of the rate is that of the largest.
        return 0.0, largest.nbytes / largest.seconds
    return latency_s, 1 / per_byte
