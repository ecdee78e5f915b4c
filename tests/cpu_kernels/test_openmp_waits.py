"""A second team lets the first give its cores up, and is gone when it is closed."""

from __future__ import annotations

import os
import threading

import torch

from cpu_kernels.openmp_waits import ShortWaits
from offload.devices.host_threads import _loaded_runtimes


def _team_threads() -> int:
    """Threads of the process that Python did not start."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def test_a_team_sleeps_until_it_is_closed() -> None:
    torch.zeros(1 << 20).add_(1)
    before = _team_threads()
    waits = ShortWaits(_loaded_runtimes()[0], 3)
    assert _team_threads() == before + 2
    assert float(torch.ones(1 << 20).sum()) == 1 << 20
    waits.close()
    waits.close()
    assert not any(thread.name == "offload-short-waits" for thread in threading.enumerate())
