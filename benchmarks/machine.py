"""The machine and the versions that figures belong to, and what it can do at best."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from cpu_kernels.wide_linear import linear_many
from offload.devices.host_threads import kernel_pool

REPOSITORY = Path(__file__).resolve().parents[1]

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "numba", "numpy", "safetensors")
_BANDWIDTH_NBYTES = 512 << 20
_GEMM_SIZE = 2048


def provenance(command: str) -> dict[str, Any]:
    """Machine, versions, date, command and commit; nothing that names the host or its directories."""
    return {
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "ram_nbytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "torch_threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": _commit(),
        "load_average_before": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    features = [name for name in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16") if name in fields.get("flags", "")]
    return (
        f"{fields.get('model name', platform.machine())}, family {fields.get('cpu family', '?')} "
        f"model {fields.get('model', '?')}, {' '.join(features)}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit} with changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def read_bandwidth() -> float:
    """Bytes per second at which torch's threads sum a large fp32 tensor; the best of three."""
    tensor = torch.ones(_BANDWIDTH_NBYTES // 4)
    return max(stream_speed(tensor) for _ in range(3))


def stream_speed(tensor: torch.Tensor) -> float:
    """Bytes per second at which torch's threads sum a tensor, once."""
    return tensor.nbytes / _seconds(tensor.sum)


def gemm_flops(dtype: torch.dtype) -> float:
    """Flops per second of the matrix product of a linear layer, the way that the runtime takes; the best of three."""
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))
    pool = kernel_pool()
    return max(2 * _GEMM_SIZE**3 / _seconds(lambda: linear_many(left, right, None, pool)) for _ in range(3))


def _seconds(call: Any) -> float:
    before = perf_counter()
    call()
    return perf_counter() - before


def evict(files: Iterable[Path]) -> None:
    """Drop the files' clean pages from the page cache; pages that are mapped now stay."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def sync(files: Iterable[Path]) -> None:
    """Write the files' dirty pages to disk."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def disk_read_nbytes() -> int:
    """Bytes that this process had the disks read since it started: O_DIRECT, page faults and readahead."""
    return _status("/proc/self/io")["read_bytes"]


@dataclass(frozen=True)
class CpuClock:
    """Seconds until a moment: of the clock, of this process on CPUs, and of everybody on the CPUs that it may use."""

    wall_s: float
    own_s: float
    all_s: float

    @classmethod
    def now(cls) -> CpuClock:
        """This moment."""
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name in cores:
                # user, nice, system, then idle and waiting, then interrupts and what other machines stole.
                ticks += sum(int(value) for value in (*values[:3], *values[5:8]))
        times = os.times()
        return cls(perf_counter(), times.user + times.system, ticks / os.sysconf("SC_CLK_TCK"))

    def others_since(self, before: CpuClock) -> float:
        """The share of its CPUs' time since `before` in which others had them, 0 to 1."""
        wall_s = (self.wall_s - before.wall_s) * len(os.sched_getaffinity(0))
        return max(0.0, (self.all_s - before.all_s) - (self.own_s - before.own_s)) / max(wall_s, 1e-9)


def memory_status() -> dict[str, int]:
    """VmRSS, VmHWM (the peak of VmRSS), RssAnon and RssFile in bytes."""
    status = _status("/proc/self/status")
    return {name: 1024 * status[name] for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def reset_peak() -> None:
    """Let VmHWM start from VmRSS again, after giving free memory back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(path: str) -> dict[str, int]:
    numbers = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if value.split() and value.split()[0].isdecimal():
            numbers[name] = int(value.split()[0])
    return numbers


def require_memory(nbytes: int, what: str) -> None:
    """Raise MemoryError where less is available: a machine that swaps or kills measures nothing."""
    available = psutil.virtual_memory().available
    if available < nbytes:
        raise MemoryError(f"{what} takes {nbytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")
