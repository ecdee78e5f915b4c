"""What is measured of an accelerator, handed in from the floor that runs it."""

from __future__ import annotations

from typing import Protocol

from placement.hardware_profile import HardwareProfile, Overheads
from profiler.subjects import Kernels


class AcceleratorSubjects(Kernels, Protocol):
    """A runtime to measure on an accelerator. Whatever is called returns when the device is done.

    Attributes:
        name: of the device, in words.
        memory_nbytes: of its memory that was free before anything was measured.
    """

    name: str
    memory_nbytes: int

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        """Seconds of copies as the runtime makes them.

        Args:
            nbytes: of one copy.
            count: copies that are asked for at once.
            up: to the device, or from it.
            pinned: host memory is locked, as far as the system locks it, or pageable.
        """
        ...

    def lock_memory(self, nbytes: int) -> int:
        """Bytes of host memory, up to `nbytes`, that the system locks beside what is locked already; let go after."""
        ...

    def passes(self, profile: HardwareProfile, quant: str | None) -> Overheads:
        """What whole forward passes with everything in the device's memory take beyond their parts.

        Args:
            profile: with the accelerator; what it predicts of passes is taken off; the accelerator's overheads are
                zero.
            quant: format of the model's weights; None for bf16.
        """
        ...
