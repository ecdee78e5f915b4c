"""The cache lines that are read when dicts and tensors are looked at, to be asked for before that.

They are hints: a table that a dict has left since, or a layout that another version has, costs a little time and
changes nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

LINE_NBYTES = 64

# Of what is behind a tensor: where its storage is and how it lies there, and then where the storage's memory is.
_TENSOR_NBYTES = 192
_STORAGE_NBYTES = 128
_WORD_NBYTES = ctypes.sizeof(ctypes.c_size_t)


def lines_of(
    dicts: Iterable[dict[Any, Any]], tensors: Iterable[torch.Tensor], counted: Iterable[dict[Any, Any]] = ()
) -> npt.NDArray[np.int64]:
    """Addresses of lines, each once, ascending.

    Args:
        dicts: in which something is looked up.
        tensors: whose memory's address is asked for.
        counted: dicts whose length is asked for.
    """
    lines = {
        address // LINE_NBYTES
        for start, nbytes in (*_parts_of_dicts(dicts), *_parts_of_tensors(tensors), *map(_itself, counted))
        for address in range(start // LINE_NBYTES * LINE_NBYTES, start + nbytes, LINE_NBYTES)
    }
    return np.array(sorted(lines), np.int64) * LINE_NBYTES


def _itself(thing: object) -> tuple[int, int]:
    return id(thing), type(thing).__basicsize__


def _parts_of_dicts(dicts: Iterable[dict[Any, Any]]) -> Iterator[tuple[int, int]]:
    for each in dicts:
        start, nbytes = _itself(each)
        yield start, nbytes
        # One of the words of a dict is the address of its table. It has no other that is far from the dict's own type.
        words = (ctypes.c_size_t * (nbytes // _WORD_NBYTES)).from_address(start)
        table_nbytes = sys.getsizeof(each) - nbytes
        yield from ((word, table_nbytes) for word in words if word > sys.maxsize >> 32 and word != id(type(each)))


def _parts_of_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        yield _itself(tensor)
        yield tensor._cdata, _TENSOR_NBYTES
        yield tensor.untyped_storage()._cdata, _STORAGE_NBYTES
