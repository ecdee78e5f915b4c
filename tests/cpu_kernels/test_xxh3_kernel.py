"""The compiled checksum against the xxHash library."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from cpu_kernels.xxh3_kernel import SHORTEST_NBYTES, checksum


def test_every_length_over_two_blocks() -> None:
    data = np.random.default_rng(0).integers(0, 256, 2600, dtype=np.uint8)
    for nbytes in range(SHORTEST_NBYTES, len(data) + 1):
        assert checksum(data.ctypes.data, nbytes) == xxhash.xxh3_64_intdigest(data[:nbytes]), nbytes


@pytest.mark.parametrize("nbytes", [4096, 65536, 1572864, 3 << 20])
@pytest.mark.parametrize("start", [0, 1, 63])
def test_bundles_wherever_they_lie(nbytes: int, start: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + start, dtype=np.uint8)[start:]
    assert checksum(data.ctypes.data, nbytes) == xxhash.xxh3_64_intdigest(np.ascontiguousarray(data))


def test_bytes_that_are_all_alike() -> None:
    for value in (0, 255):
        data = np.full(8192, value, np.uint8)
        assert checksum(data.ctypes.data, 8192) == xxhash.xxh3_64_intdigest(data)


def test_one_bit_anywhere_shows() -> None:
    data = np.zeros(4096, np.uint8)
    right = checksum(data.ctypes.data, 4096)
    for place in range(0, 4096, 37):
        data[place] ^= 4
        assert checksum(data.ctypes.data, 4096) != right
        data[place] ^= 4
    assert checksum(data.ctypes.data, 4096) == right
