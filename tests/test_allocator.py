"""Large blocks are mapped one by one from then on, unless the user chose otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from offload.allocator import KEPT_NBYTES, return_large_blocks


class _Info(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde"))


def mapped_nbytes() -> int:
    """Bytes in blocks that are mapped one by one."""
    try:
        found = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("this C library does not say what it mapped")
    found.restype = _Info
    return int(found().hblkhd)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    return_large_blocks.cache_clear()
    yield
    return_large_blocks.cache_clear()


def test_large_blocks_are_mapped_even_after_larger_ones_were_freed() -> None:
    assert return_large_blocks()
    for _ in range(3):
        before = mapped_nbytes()
        large = torch.zeros(2 * KEPT_NBYTES, dtype=torch.uint8)
        assert mapped_nbytes() - before >= large.nbytes
        del large
        assert mapped_nbytes() <= before


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_chose_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not return_large_blocks()
