"""The profile of this machine: from the cache, or measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from offload.request import store_root
from profiler.cache import read_profile, write_profile
from profiler.machine import Machine, this_machine

if TYPE_CHECKING:
    from placement.hardware_profile import HardwareProfile

_FULL_REPEATS, _QUICK_REPEATS = 30, 6
_QUICK_SCRATCH_NBYTES = 128 << 20


def profiles_directory() -> Path:
    """Where profiles are cached: in $XDG_CACHE_HOME/offload, else ~/.cache/offload."""
    return store_root(None) / "profiles"


def machine_with(root: Path) -> Machine:
    """The machine at hand with the disk of a directory of stores, which need not exist."""
    return this_machine(existing(root))


def existing(root: Path) -> Path:
    """The directory, or the nearest one above that is there."""
    return next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())


def cached_profile(root: Path, formats: Iterable[str] = ()) -> HardwareProfile | None:
    """What was measured here before; None where nothing was, or not these formats."""
    profile = read_profile(profiles_directory(), machine_with(root))
    return profile if profile is not None and profile.knows(formats) else None


def measure_profile(root: Path, *, quick: bool, say: Callable[[str], None]) -> tuple[HardwareProfile, Path]:
    """Measure this machine and keep the profile; what was written beside it is removed.

    Args:
        root: directory of stores, on the disk to be measured; made if it is not there.
        quick: fewer formats, sizes and repeats.
        say: told what is being measured.

    Returns:
        the profile and where it is kept.

    Raises:
        OSError: the disk cannot be written or read.
    """
    from offload.measuring.calibration import DEPTHS, QUICK_DEPTHS
    from offload.measuring.reads import SCRATCH_NBYTES, Scratch
    from offload.measuring.subjects import RuntimeSubjects
    from offload.store.files import free_nbytes
    from profiler.profile import FULL, QUICK, measure_machine

    root.mkdir(parents=True, exist_ok=True)
    machine = machine_with(root)
    say("writing a scratch file")
    with Scratch(root, _QUICK_SCRATCH_NBYTES if quick else SCRATCH_NBYTES) as scratch:
        repeats, depths = (_QUICK_REPEATS, QUICK_DEPTHS) if quick else (_FULL_REPEATS, DEPTHS)
        subjects = RuntimeSubjects(scratch, root, repeats=repeats, depths=depths)
        effort = QUICK if quick else FULL
        profile = measure_machine(subjects, machine, free_nbytes(root), effort=effort, say=say)
    return profile, write_profile(profiles_directory(), machine, profile)
