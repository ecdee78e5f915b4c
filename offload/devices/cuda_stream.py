"""The doorbell's side of a GPU: values that a CUDA stream writes and waits for, without the host."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.word_functions import wait_function, write_function
from offload.devices.mailbox import Stream
from offload.errors import DeviceError

_WRITE_DEFAULT = 0
"""CU_STREAM_WRITE_VALUE_DEFAULT: after a barrier, so that what the stream wrote before can be seen."""

_WAIT_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""


class CudaStream(Stream):
    """A stream of torch's, in a capture or not.

    Stream memory operations are the driver's (cuStreamWriteValue32, cuStreamWaitValue32), which torch does not have.
    """

    def __init__(self, stream: torch.cuda.Stream, library: Any = None) -> None:
        """Find the driver.

        Args:
            stream: of the device whose kernels ring.
            library: the driver, None for libcuda.

        Raises:
            DeviceError: there is no driver, or one without these operations.
        """
        self._stream = stream
        try:
            driver = ctypes.CDLL("libcuda.so.1") if library is None else library
            self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        except (OSError, AttributeError) as error:
            raise DeviceError(f"the doorbell needs a CUDA driver from 11.7 on: {error}") from error
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
            function.restype = ctypes.c_int

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the stream; the one on the host must be pinned."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def write_value(self, address: int, value: int) -> None:
        """See `Stream`.

        Raises:
            DeviceError: the driver refuses.
        """
        self._check("cuStreamWriteValue32", self._write(self._stream.cuda_stream, address, value, _WRITE_DEFAULT))

    def wait_value(self, address: int, value: int) -> None:
        """See `Stream`.

        Raises:
            DeviceError: the driver refuses.
        """
        self._check("cuStreamWaitValue32", self._wait(self._stream.cuda_stream, address, value, _WAIT_EQUAL))

    @staticmethod
    def _check(name: str, status: int) -> None:
        if status:
            raise DeviceError(f"{name}: the CUDA driver refused with error {status}")


class HostFunctionStream(CudaStream):
    """Words that functions on the driver's own thread write and wait for (cuLaunchHostFunc), in compiled code.

    For drivers that refuse stream memory operations. While one waits, no other stream's host functions may be called.
    """

    def __init__(self, stream: torch.cuda.Stream, library: Any = None) -> None:
        """Find the driver.

        Args:
            stream: as of `CudaStream`.
            library: as of `CudaStream`.

        Raises:
            DeviceError: there is no driver.
        """
        self._stream = stream
        # A captured graph calls with the same arguments in every replay.
        self._arguments: list[npt.NDArray[np.int64]] = []
        try:
            driver = ctypes.CDLL("libcuda.so.1") if library is None else library
            self._launch = driver.cuLaunchHostFunc
        except (OSError, AttributeError) as error:
            raise DeviceError(f"the doorbell needs a CUDA driver: {error}") from error
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._launch.restype = ctypes.c_int

    def write_value(self, address: int, value: int) -> None:
        """See `Stream`.

        Raises:
            DeviceError: the driver refuses.
        """
        self._call(write_function(), address, value)

    def wait_value(self, address: int, value: int) -> None:
        """See `Stream`.

        Raises:
            DeviceError: the driver refuses.
        """
        self._call(wait_function(), address, value)

    def _call(self, function: int, address: int, value: int) -> None:
        arguments = np.array([address, value], np.int64)
        self._arguments.append(arguments)
        status = self._launch(self._stream.cuda_stream, function, arguments.ctypes.data)
        self._check("cuLaunchHostFunc", status)
