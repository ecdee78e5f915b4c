"""Every kernel compiles for every supported card, keeps its values in registers and fits in shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 86, 89, 90, 120)
# Bytes of shared memory that one program may ask for (CUDA C++ programming guide, compute capabilities).
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


def compiled(which: str, cache: Path) -> list[dict[str, object]]:
    """What `tests.gpu_kernels.cubins` reports; in a process of its own, because this one may interpret kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_kernels.cubins", which, *map(str, CAPABILITIES)]
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, object]] = json.loads(result.stdout)
    return found


def assert_fit(cubins: list[dict[str, object]]) -> None:
    spilling = [cubin for cubin in cubins if cubin["stack"] != 0]
    large = [cubin for cubin in cubins if cubin["shared"] > SHARED_LIMITS[cubin["capability"]]]  # type: ignore[index, operator]
    assert not spilling and not large, f"spills: {spilling}; too much shared memory: {large}"


def test_every_kernel(tmp_path: Path) -> None:
    cubins = compiled("first", tmp_path)
    kernels = {str(cubin["kernel"]) for cubin in cubins}
    assert kernels == {
        "attention_partial_kernel", "combine_kernel", "gate_splits_kernel", "group_few_kernel", "group_many_kernel",
        "grouped_linear_kernel", "merge_kernel", "packed_linear_kernel", "paged_attention_kernel",
        "write_tokens_kernel",
    }  # fmt: skip
    assert len(cubins) == len(kernels) * len(CAPABILITIES)
    assert_fit(cubins)


@pytest.mark.configs
@pytest.mark.timeout(3600)
def test_every_config(tmp_path: Path) -> None:
    assert_fit(compiled("every", tmp_path))
