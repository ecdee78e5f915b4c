"""A GPU as the profiler measures it: the runtime's CUDA device, its kernels and copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from formats.elements import BF16, FP32
from formats.packed import PACKED_FORMATS
from offload.devices.cuda import CudaDevice
from offload.devices.cuda_driver import CudaDriver
from offload.measuring.accelerated_passes import measure_accelerated_passes
from offload.measuring.calibration import DEPTHS
from offload.measuring.device_copies import DeviceCopies
from offload.measuring.device_kernels import DeviceLinears, SlotCalls, device_attention, device_stream
from placement.hardware_profile import HardwareProfile, Overheads
from profiler.subjects import Attention, Product

_NO_BOUND = 1 << 60
"""Of slabs: the card's memory is one."""


class CudaSubjects:
    """See `profiler.accelerator_subjects.AcceleratorSubjects`; a context manager that gives memory back."""

    formats: Sequence[str] = (BF16.name, FP32.name, *PACKED_FORMATS)

    def __init__(
        self, driver: CudaDriver, device: str, directory: Path, *, repeats: int, depths: tuple[int, ...] = DEPTHS
    ) -> None:
        """Open the device.

        Args:
            driver: of the device.
            device: as `offload.load` takes it.
            directory: of experts for whole passes.
            repeats: of whole passes.
            depths: layers of the models whose passes they are.
        """
        self.memory_nbytes, _ = driver.memory_nbytes()
        self.name = driver.describe()
        self._driver = driver
        self._name = device
        self._directory = directory
        self._repeats = repeats
        self._depths = depths
        self._device = CudaDevice(driver, _NO_BOUND)
        # Weights of one format at a time: there may be no room for more.
        self._experts: dict[bool, SlotCalls] = {}
        self._linears: tuple[tuple[str, int], DeviceLinears] | None = None
        self._copies: DeviceCopies | None = None

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        """See `Kernels`."""
        if any(calls.format != format for calls in self._experts.values()):
            self._close_experts()
        if narrow not in self._experts:
            self._experts[narrow] = SlotCalls(self._device, format, narrow=narrow)
        return self._experts[narrow].product(count, tokens)

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        """See `Kernels`."""
        if self._linears is None or self._linears[0] != (format, rows):
            self._linears = None
            self._linears = (format, rows), DeviceLinears(format, rows, self._driver.device)
        return self._linears[1].product(tokens, self._driver.finish_kernels)

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        """See `Kernels`."""
        finish = self._driver.finish_kernels
        return device_attention(new_tokens, cached_tokens, self._driver.device, finish, narrow=narrow)

    def stream(self) -> float:
        """See `Kernels`."""
        return device_stream(self._driver.device, self._seconds)

    def _seconds(self, call: Callable[[], object]) -> float:
        self._driver.finish_kernels()
        before = perf_counter()
        call()
        self._driver.finish_kernels()
        return perf_counter() - before

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        """See `AcceleratorSubjects`."""
        return self._memory().copy(nbytes, count, up=up, pinned=pinned)

    def lock_memory(self, nbytes: int) -> int:
        """See `AcceleratorSubjects`."""
        return self._memory().lock_memory(nbytes)

    def _memory(self) -> DeviceCopies:
        if self._copies is None:
            self._copies = DeviceCopies(self._device)
        return self._copies

    def passes(self, profile: HardwareProfile, quant: str | None) -> Overheads:
        """See `AcceleratorSubjects`."""
        self.close()
        try:
            return measure_accelerated_passes(
                profile, self._directory, self._name, self._repeats, quant, self._depths
            )  # fmt: skip
        finally:
            self._driver.trim()

    def close(self) -> None:
        """Give memory back; what is measured next takes it anew."""
        if self._copies is not None:
            self._copies.close()
        self._copies = self._linears = None
        self._close_experts()
        self._driver.trim()

    def _close_experts(self) -> None:
        while self._experts:
            self._experts.popitem()[1].close()

    def __enter__(self) -> CudaSubjects:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
