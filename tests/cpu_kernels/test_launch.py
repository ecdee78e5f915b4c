"""Compiled code starts a pool's threads, from several Python threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

from cpu_kernels.linear import linear
from cpu_kernels.threads import Pool, ThreadPool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import random


@pytest.mark.parametrize("own", [True, False])
def test_several_python_threads_launch_at_once(own: bool) -> None:
    pool: Pool = ThreadPool(3) if own else kernel_pool()
    weight = random((600, 256), torch.float32, 1)
    inputs = [random((1, 256), torch.float32, seed) for seed in range(4)]
    expected = [linear(x, weight, None, pool) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            if not torch.equal(linear(inputs[index], weight, None, pool), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if isinstance(pool, ThreadPool):
        pool.close()
    assert not wrong
