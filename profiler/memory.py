"""How much memory this process may use: what the machine has, clamped by every cgroup above the process."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")
_PROC_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}
"""By cgroup version: the files of a group's limits and of its use."""


def available_ram_nbytes(*, proc_cgroup: Path = _PROC_CGROUP, root: Path = _CGROUP_ROOT) -> int:
    """Bytes that can be allocated now without swapping or being killed.

    The least of the machine's available memory and, for the process's cgroup and each of its ancestors (v1 and v2),
    limit minus use. Of v2's two limits the lower counts: above memory.high the kernel slows the group down. Inactive
    page cache of the group counts as free, because the kernel takes it back.

    Args:
        proc_cgroup: the process's membership file.
        root: where cgroup file systems are mounted.
    """
    rooms = [int(psutil.virtual_memory().available)]
    for directory, version in _ancestors(proc_cgroup, root):
        room = _room(directory, version)
        if room is not None:
            rooms.append(room)
    return max(0, min(rooms))


def process_rss_nbytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def process_peak_rss_nbytes(*, status: Path = _PROC_STATUS) -> int:
    """The most resident memory that this process had, since it began or since `reset_peak_rss`, in bytes."""
    for line in _text(status).splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) << 10
    return int(psutil.Process().memory_info().rss)


def reset_peak_rss(*, clear_refs: Path = _CLEAR_REFS) -> bool:
    """Let the peak begin from what is resident now; False where the kernel does not do that."""
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


def _ancestors(proc_cgroup: Path, root: Path) -> list[tuple[Path, int]]:
    found = []
    for line in _text(proc_cgroup).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and controllers == "":
            base, version = root, 2
        elif "memory" in controllers.split(","):
            base, version = root / "memory", 1
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            found.append((group, version))
            if group == base:
                break
            group = group.parent
    return found


def _room(group: Path, version: int) -> int | None:
    limit_files, use_file = _FILES[version]
    limits = [limit for file in limit_files if (limit := _number(_text(group / file))) is not None]
    use = _number(_text(group / use_file))
    if not limits or use is None:
        return None
    cache = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            cache = max(cache, _number(value) or 0)
    return min(limits) - max(0, use - cache)


def _text(file: Path) -> str:
    """The file's content; empty where it does not exist or cannot be read."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    """None for "max" and for nothing."""
    return int(text) if text.strip().isdecimal() else None
