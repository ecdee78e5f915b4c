"""Kernels on torch's OpenMP team give what they give on threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels.expert_mlp import expert_mlp
from cpu_kernels.openmp import OpenMpPool
from cpu_kernels.threads import shared_pool
from formats.bundle import BundleLayout
from offload.devices.host_threads import _loaded_runtimes, kernel_pool

LAYOUT = BundleLayout(96, 130, "fp32")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> OpenMpPool:
    return OpenMpPool(_loaded_runtimes()[0], 64)


def _problem(seed: int) -> tuple[np.ndarray, tuple[object, ...]]:
    rng = np.random.default_rng(seed)
    experts, tokens = 5, 4
    bundles = rng.standard_normal((experts, LAYOUT.nbytes // 4), dtype=np.float32) * 0.1
    addresses = np.array([bundle.ctypes.data for bundle in bundles], dtype=np.intp)
    offsets = np.array([0, 1, 1, 4, 6, 9])
    x = rng.standard_normal((tokens, LAYOUT.hidden), dtype=np.float32)
    return bundles, (addresses, LAYOUT, offsets, rng.integers(0, tokens, 9), x, "silu")


def _run(arguments: tuple[object, ...], pool: object) -> np.ndarray:
    out = np.full((9, LAYOUT.hidden), np.nan, dtype=np.float32)
    expert_mlp(*arguments, out, np.arange(9), threads=pool)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_team(pool: OpenMpPool, threads: int) -> None:
    kept, arguments = _problem(threads)
    expected = _run(arguments, shared_pool(1))
    torch.set_num_threads(threads)
    assert pool.threads == threads
    for _ in range(50):
        np.testing.assert_array_equal(_run(arguments, pool), expected)
    del kept


def test_the_bound_holds() -> None:
    torch.set_num_threads(3)
    assert OpenMpPool(_loaded_runtimes()[0], 2).threads == 2


def test_several_python_threads_have_teams_of_their_own(pool: OpenMpPool) -> None:
    problems = [_problem(seed) for seed in range(4)]
    expected = [_run(arguments, shared_pool(1)) for _, arguments in problems]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not np.array_equal(_run(problems[index][1], pool), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_runtime_is_torchs_own() -> None:
    assert isinstance(kernel_pool(), OpenMpPool)


def test_another_library_is_refused() -> None:
    with pytest.raises((OSError, AttributeError)):
        OpenMpPool(Path("libm.so.6"), 2)
