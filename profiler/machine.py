"""Which machine this is: what a profile belongs to, and when it is stale."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "transformers", "numba", "numpy")
_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Machine:
    """What figures depend on.

    Attributes:
        cpu: model, family and the instructions that kernels use.
        cores: that this process may use.
        ram_nbytes: in the machine.
        gpus: names of accelerators, with their memory.
        versions: of the libraries, as "name version".
        disk: device number of the file system that was measured.
    """

    cpu: str
    cores: int
    ram_nbytes: int
    gpus: tuple[str, ...]
    versions: tuple[str, ...]
    disk: int

    @property
    def fingerprint(self) -> str:
        """Hex digest; another one is another machine, or other libraries."""
        parts = (self.cpu, str(self.cores), str(self.ram_nbytes >> 28), *self.gpus, *self.versions, str(self.disk))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def describe(self) -> str:
        """In words, without anything that names the host."""
        gpus = ", ".join(self.gpus) or "no GPU"
        return f"{self.cpu}, {self.cores} cores, {self.ram_nbytes / (1 << 30):.1f} GiB, {gpus}"


def this_machine(directory: Path, *, cpuinfo: Path = _CPUINFO) -> Machine:
    """The machine at hand.

    Args:
        directory: on the disk that counts; exists.
        cpuinfo: the kernel's description of processors.
    """
    return Machine(
        cpu=_cpu(cpuinfo),
        cores=len(os.sched_getaffinity(0)),
        ram_nbytes=int(psutil.virtual_memory().total),
        gpus=tuple(f"{gpu.name} {gpu.total_nbytes / (1 << 30):.0f} GiB" for gpu in gpus()),
        versions=tuple(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES),
        disk=directory.stat().st_dev,
    )


def now() -> str:
    """ISO 8601 in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


@dataclass(frozen=True)
class GpuMemory:
    """An accelerator's memory as its driver counts it."""

    name: str
    total_nbytes: int
    free_nbytes: int


def gpus() -> tuple[GpuMemory, ...]:
    """Accelerators that NVML knows; none where there is no driver, which is a normal case."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(GpuMemory(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _cpu(cpuinfo: Path) -> str:
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.machine()
    flags = fields.get("flags", "").split()
    features = " ".join(name for name in _FEATURES if name in flags)
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family}) {features}".strip()
