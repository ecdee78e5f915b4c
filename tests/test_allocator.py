"""Large blocks are mapped one by one from then on, unless the user chose otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from offload.allocator import return_large_blocks

_IN_A_NEW_PROCESS = """
import ctypes, sys
from offload.allocator import KEPT_NBYTES, return_large_blocks

class Info(ctypes.Structure):  # glibc's `struct mallinfo2`; `hblkhd` are bytes in blocks that are mapped one by one
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde")]

library = ctypes.CDLL(None)
if not hasattr(library, "mallinfo2"):
    sys.exit("no mallinfo2")
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

assert return_large_blocks()
for large_nbytes in (4 * KEPT_NBYTES - 1, 2 * KEPT_NBYTES, KEPT_NBYTES):
    before = library.mallinfo2().hblkhd
    address = library.malloc(large_nbytes)
    assert library.mallinfo2().hblkhd - before >= large_nbytes
    library.free(address)
    assert library.mallinfo2().hblkhd == before
"""
"""Alone, because a heap in which others left a free piece of that size would give that piece."""


def test_large_blocks_are_mapped_even_after_larger_ones_were_freed() -> None:
    done = subprocess.run([sys.executable, "-c", _IN_A_NEW_PROCESS], capture_output=True, text=True, check=False)
    if "no mallinfo2" in done.stderr:
        pytest.skip("this C library does not say what it mapped")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_chose_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    return_large_blocks.cache_clear()
    monkeypatch.setenv(name, "1")
    try:
        assert not return_large_blocks()
    finally:
        return_large_blocks.cache_clear()
