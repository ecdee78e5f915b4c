"""The points of curves: which calls of experts and of linear layers are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from profiler.rounds import Point
from profiler.subjects import Kernels

NARROW_TOKENS = 32
_NARROW_COUNT = 8


def expert_points(
    kernels: Kernels, format: str, tokens: Sequence[int], several: Callable[[int], int], *, entries: bool
) -> list[Point]:
    """Calls of one expert with one token, of several with each number of tokens, and of narrow ones with one token, of
    which each takes some time whatever its size.

    Args:
        kernels: whose experts they are.
        format: of the experts.
        tokens: of an expert.
        several: how many experts a call with so many tokens has.
        entries: narrow experts of NARROW_TOKENS tokens as well; those take much of their time for what enters and
            leaves them, which is so told apart from what weights take.
    """
    what = f"experts in {format}"
    narrow = {n: partial(kernels.experts, format, _NARROW_COUNT, n, narrow=True) for n in (1, NARROW_TOKENS)}
    return [
        Point(f"{what}, small", 1, partial(kernels.experts, format, 1, 1)),
        *(Point(f"{what}, {n} tokens", n, partial(kernels.experts, format, several(n), n)) for n in tokens),
        Point(f"{what}, narrow, one token", 1, narrow[1]),
        *([Point(f"{what}, narrow", NARROW_TOKENS, narrow[NARROW_TOKENS])] if entries else []),
    ]


def linear_points(kernels: Kernels, format: str, tokens: Sequence[int], large: int, small: int) -> list[Point]:
    """Layers of `large` outputs with each number of tokens, and of `small` ones with the fewest and the most."""
    what = f"linear layers in {format}"
    # Small ones last: weights of one size are made at a time.
    return [
        *(Point(f"{what}, {n} tokens", n, partial(kernels.linear, format, large, n)) for n in tokens),
        *(
            Point(f"{what}, small, {n} tokens", n, partial(kernels.linear, format, small, n))
            for n in (tokens[0], tokens[-1])
        ),
    ]
