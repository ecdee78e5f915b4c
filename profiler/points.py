"""The points of curves: which calls of experts and of linear layers are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from formats.packed import PACKED_FORMATS
from profiler.rounds import Point
from profiler.subjects import Kernels

_NARROW_TOKENS, _NARROW_UNPACKED_TOKENS = 32, 48
"""Of narrow experts. Others than packed ones may have a kernel of their own for that many tokens and more, which takes
less for each entry than that for fewer; experts of most prompts are on either side.
"""
NARROW_COUNT = 8


def narrow_tokens(format: str, tokens: Sequence[int]) -> int:
    """Which of these numbers of tokens narrow experts of a format are measured with, besides one."""
    wanted = _NARROW_TOKENS if format in PACKED_FORMATS else _NARROW_UNPACKED_TOKENS
    return next((n for n in tokens if n >= wanted), tokens[-1])


def expert_points(kernels: Kernels, format: str, tokens: Sequence[int], several: Callable[[int], int]) -> list[Point]:
    """Calls of one expert with one token, of several with each number of tokens, and of narrow ones: with one token, of
    which each takes some time whatever its size, and with several, which take much of their time for what enters and
    leaves them; that is so told apart from what weights take.

    Args:
        kernels: whose experts they are.
        format: of the experts.
        tokens: of an expert.
        several: how many experts a call with so many tokens has.
    """
    what = f"experts in {format}"
    several_tokens = narrow_tokens(format, tokens)
    narrow = {n: partial(kernels.experts, format, NARROW_COUNT, n, narrow=True) for n in (1, several_tokens)}
    return [
        Point(f"{what}, small", 1, partial(kernels.experts, format, 1, 1)),
        *(Point(f"{what}, {n} tokens", n, partial(kernels.experts, format, several(n), n)) for n in tokens),
        Point(f"{what}, narrow, one token", 1, narrow[1]),
        Point(f"{what}, narrow", several_tokens, narrow[several_tokens]),
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
