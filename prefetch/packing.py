"""Integers into and out of arrays that are there: a new array for each call of a kernel costs more than its work."""

from __future__ import annotations

from functools import cache
from struct import Struct


@cache
def int64s(count: int) -> Struct:
    """Packs and unpacks `count` numbers, as int64 arrays hold them."""
    return Struct(f"{count}q")
