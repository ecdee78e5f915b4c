"""Profiles on disk: one file for each machine, written once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from placement.hardware_profile import HardwareProfile
from profiler.machine import Machine


def profile_path(directory: Path, machine: Machine) -> Path:
    """Where the profile of a machine lies, whether or not it is there."""
    return directory / f"{machine.fingerprint}.json"


def read_profile(directory: Path, machine: Machine) -> HardwareProfile | None:
    """The machine's profile; None where it was not measured, or by a version that wrote it otherwise."""
    try:
        profile = HardwareProfile.from_json(profile_path(directory, machine).read_text())
    except (OSError, ValueError):
        return None
    return profile if profile.provenance.fingerprint == machine.fingerprint else None


def write_profile(directory: Path, machine: Machine, profile: HardwareProfile) -> Path:
    """Write a profile in the place of the one before; a reader finds one or the other, whole.

    Raises:
        OSError: the directory cannot be written.
    """
    path = profile_path(directory, machine)
    write_whole(path, profile.to_json() + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file in the place of the one before; a reader finds one or the other, whole.

    Raises:
        OSError: its directory cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
