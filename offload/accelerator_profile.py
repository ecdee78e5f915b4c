"""A profile with this machine's GPU, where there is one that the runtime can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import DeviceError

if TYPE_CHECKING:
    from placement.hardware_profile import HardwareProfile
    from profiler.effort import Effort
    from profiler.subjects import Subjects

DEVICE = "cuda"
"""Torch's current one of several: a plan is for one."""


def with_accelerator(
    profile: HardwareProfile,
    host: Subjects,
    directory: Path,
    *,
    gpus: tuple[str, ...],
    effort: Effort,
    repeats: int,
    depths: tuple[int, ...],
    say: Callable[[str], None],
) -> HardwareProfile:
    """Measure the GPU. Where that fails, and there is one, the host's profile says why in its notes.

    Args:
        profile: of the host.
        host: what it was measured on, whose kernels run beside copies.
        directory: of experts for whole passes; what is written there is removed.
        gpus: names of those that the machine has.
        effort: FULL or QUICK.
        repeats: of whole passes.
        depths: layers of the models whose passes they are.
        say: told what is being measured.
    """
    from offload.devices.cuda_driver import open_cuda

    try:
        driver = open_cuda(DEVICE)
    except DeviceError as error:
        return _not_measured(profile, str(error)) if gpus else profile
    from offload.measuring.cuda_subjects import CudaSubjects
    from profiler.accelerator import measure_accelerator

    try:
        with CudaSubjects(driver, DEVICE, directory, repeats=repeats, depths=depths) as subjects:
            return measure_accelerator(subjects, host, profile, effort=effort, say=say)
    except Exception as error:  # noqa: BLE001 - whatever a driver or a compiler of kernels raises
        reason = next(iter(str(error).strip().splitlines()), "")
        return _not_measured(profile, f"{type(error).__name__}: {reason}")


def _not_measured(profile: HardwareProfile, reason: str) -> HardwareProfile:
    note = f"the GPU was not measured: {reason}; `offload profile --again` tries once more"
    return replace(profile, provenance=replace(profile.provenance, notes=(*profile.provenance.notes, note)))
