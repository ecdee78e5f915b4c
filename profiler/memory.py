"""How much memory this process may use: what the machine has, clamped by every cgroup above the process."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")


def available_ram_nbytes(*, proc_cgroup: Path = _PROC_CGROUP, root: Path = _CGROUP_ROOT) -> int:
    """Bytes that can be allocated now without swapping or being killed.

    The least of the machine's available memory and, for the process's cgroup and each of its ancestors (v1 and v2),
    limit minus use; page cache of the group counts as free, because the kernel takes it back.

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


def _ancestors(proc_cgroup: Path, root: Path) -> list[tuple[Path, int]]:
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
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
    limit_file, use_file = (
        ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limit, use = _number(group / limit_file), _number(group / use_file)
    if limit is None or use is None:
        return None
    cache = 0
    try:
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                cache = max(cache, int(value))
    except OSError:
        pass
    return limit - use + cache


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
