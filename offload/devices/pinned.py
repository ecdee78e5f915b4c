"""Host memory that is locked for copies to a CUDA device, as far as the system allows."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from offload.devices.cuda_driver import CudaDriver, PinRefusedError
from offload.devices.host import HostDevice, HostSlab
from offload.errors import SlowDeviceWarning


class PinnedSlab(HostSlab):
    """Host memory, locked while none of it was given back.

    The device copies from the pages that it locked: a page that was given back and taken anew is another one. So a
    slab is unlocked before any part of it goes, and stays so; copies from it are slower then, not wrong.

    Attributes:
        pinned: whether it is locked.
    """

    def __init__(self, nbytes: int, driver: CudaDriver) -> None:
        super().__init__(nbytes)
        self._driver = driver
        self.pinned = False
        driver.pin(self.address, self.nbytes)
        self.pinned = True

    def discard(self, offset: int, nbytes: int) -> None:
        """Unlock the slab and give the pages of a range back."""
        self.unpin()
        super().discard(offset, nbytes)

    def unpin(self) -> None:
        """Unlock; may be called again."""
        if self.pinned:
            self.pinned = False
            self._driver.unpin(self.address)

    def __del__(self) -> None:
        # Memory that is unmapped while it is locked stays locked for the driver.
        if getattr(self, "pinned", False):
            self.unpin()


class PinnedHostDevice(HostDevice):
    """Host memory and the CPU kernels, beside a CUDA device.

    Attributes:
        refused_nbytes: bytes that the system did not lock.
    """

    slab_nbytes = 256 << 20

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.refused_nbytes = 0

    def allocate(self, nbytes: int) -> HostSlab:
        """A locked slab, or a plain one, with a warning, where the system locks no more."""
        if not self.refused_nbytes:
            try:
                return PinnedSlab(nbytes, self._driver)
            except PinRefusedError as error:
                warnings.warn(
                    f"the system refused to pin host memory ({error}): expert slots in RAM are pageable from here on "
                    "and copies to the GPU slower; see docs/gpu.md, Troubleshooting",
                    SlowDeviceWarning,
                    stacklevel=2,
                )
        self.refused_nbytes += nbytes
        return HostSlab(nbytes)


def host_bytes(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Host memory at an address as uint8 [nbytes], which the caller keeps valid."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
