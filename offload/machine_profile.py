"""The profile of this machine: from the cache, or measured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload.accelerator_profile import with_accelerator
from offload.request import store_root
from profiler.cache import read_profile, write_profile
from profiler.machine import Machine, this_machine

if TYPE_CHECKING:
    from offload.measuring.reads import FileReads
    from placement.hardware_profile import HardwareProfile

_FULL_REPEATS, _QUICK_REPEATS = 30, 6
_QUICK_SCRATCH_NBYTES = 128 << 20
_LEAST_SHARD_NBYTES = 64 << 20


def profiles_directory() -> Path:
    """Where profiles are cached: in $XDG_CACHE_HOME/offload, else ~/.cache/offload."""
    return store_root(None) / "profiles"


def machine_with(root: Path) -> Machine:
    """The machine at hand with the disk of a directory of stores, which need not exist."""
    return this_machine(existing(root))


def existing(root: Path) -> Path:
    """The directory, or the nearest one above that is there."""
    return next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())


def cached_profile(root: Path) -> HardwareProfile | None:
    """What was measured here before; None where nothing was."""
    return read_profile(profiles_directory(), machine_with(root))


def measure_profile(root: Path, *, quick: bool, say: Callable[[str], None]) -> tuple[HardwareProfile, Path]:
    """Measure this machine, with its GPU where the runtime can use it, and keep the profile; what was written beside it
    is removed.

    The disk is measured on the stores that are there, where they have enough, else on a file that is written first and
    read last; a note says so, for a virtual machine's host may have that in its memory.

    Args:
        root: directory of stores, on the disk to be measured; made if it is not there.
        quick: fewer formats, sizes and repeats.
        say: told what is being measured.

    Returns:
        the profile and where it is kept.

    Raises:
        OSError: the disk cannot be written or read.
    """
    from offload.measuring.reads import SCRATCH_NBYTES
    from offload.store.files import free_nbytes
    from profiler.effort import FULL, QUICK
    from profiler.profile import measure_machine

    root.mkdir(parents=True, exist_ok=True)
    machine = machine_with(root)
    with ExitStack() as stack:
        disk, note = _files_to_read(root, _QUICK_SCRATCH_NBYTES if quick else SCRATCH_NBYTES, stack, say)
        from offload.measuring.calibration import DEPTHS, QUICK_DEPTHS
        from offload.measuring.subjects import RuntimeSubjects

        repeats, depths = (_QUICK_REPEATS, QUICK_DEPTHS) if quick else (_FULL_REPEATS, DEPTHS)
        subjects = stack.enter_context(RuntimeSubjects(disk.result(), root, repeats=repeats, depths=depths))
        effort = QUICK if quick else FULL
        profile = measure_machine(subjects, machine, free_nbytes(root), effort=effort, say=say)
        profile = with_accelerator(
            profile, subjects, root, gpus=machine.gpus, effort=effort, repeats=repeats, depths=depths, say=say
        )  # fmt: skip
    origin = replace(profile.provenance, notes=(*profile.provenance.notes, note))
    profile = replace(profile, provenance=origin)
    return profile, write_profile(profiles_directory(), machine, profile)


def _files_to_read(
    root: Path, nbytes: int, stack: ExitStack, say: Callable[[str], None]
) -> tuple[Future[FileReads], str]:
    """(files on the disk to be measured, what a reader of the profile must know of them).

    A file that has to be written is, while whoever called imports the rest.
    """
    from offload.measuring.reads import FileReads, Scratch

    shards = store_files(root)
    found: Future[FileReads] = Future()
    if shards and FileReads(shards).nbytes >= nbytes:
        found.set_result(FileReads(shards))
        return found, "the disk was measured on the expert stores that were there"
    say("writing a scratch file")
    writer = stack.enter_context(ThreadPoolExecutor(1))
    found = writer.submit(lambda: stack.enter_context(Scratch(root, nbytes)))
    return found, (
        "the disk was measured on a file that was just written, for lack of expert stores: where a virtual machine's "
        "host keeps such a file in memory, what a model reads for the first time comes at a fraction of that speed"
    )


def store_files(root: Path) -> list[Path]:
    """The shards of the complete stores under a root that are large enough to be read like large bundles."""
    from offload.store.catalog import list_stores
    from offload.store.store import ExpertStore

    stores = [ExpertStore.open(info.path) for info in list_stores(root) if info.status == "complete"]
    return [path for store in stores for path in store.shard_paths if path.stat().st_size >= _LEAST_SHARD_NBYTES]
