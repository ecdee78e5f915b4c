"""What the CUDA device asks of CUDA: a thin layer over torch, so that everything above it is tested without a GPU."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from functools import cache

import torch

from offload.devices.memory_claims import MemoryClaims
from offload.errors import DeviceError
from offload.step_graph.graph import StepGraph

_NAME = re.compile(r"cuda(?::(?P<index>\d+))?")


class PinRefusedError(Exception):
    """The system does not lock so much memory."""


class Moment:
    """A moment of the stream that kernels are given to."""


class CopyStream(ABC):
    """A queue of copies to a device."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [n] from host memory to the device, or back."""

    @abstractmethod
    def follow(self, moment: Moment) -> None:
        """Begin what is queued from here on when all that was before a moment is done."""

    @abstractmethod
    def synchronise(self) -> None:
        """Return when all that was queued is done; other threads run meanwhile."""


class CudaDriver(ABC):
    """One CUDA device.

    Attributes:
        device: as torch names it.
        claims: on the device's memory; the same for all drivers of the device.
    """

    device: torch.device
    claims: MemoryClaims

    @abstractmethod
    def describe(self) -> str:
        """The card's name."""

    @abstractmethod
    def memory_nbytes(self) -> tuple[int, int]:
        """(bytes that are free now, bytes in all)."""

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device, not initialised.

        Raises:
            torch.OutOfMemoryError: there is not so much.
        """

    @abstractmethod
    def trim(self) -> None:
        """Give memory that torch keeps for later back to the device."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> None:
        """Lock host memory, so that copies from it are the device's own.

        Raises:
            PinRefusedError: the system refuses.
        """

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin` of the memory that begins here."""

    @abstractmethod
    def copy_stream(self) -> CopyStream:
        """A new queue of copies."""

    @abstractmethod
    def moment(self) -> Moment:
        """Now, on the current stream: after all that it was given so far."""

    @abstractmethod
    def step_graph(self) -> StepGraph:
        """An empty graph.

        Raises:
            DeviceError: the driver lacks what a doorbell needs.
        """

    @abstractmethod
    def finish_kernels(self) -> None:
        """Return when the current stream is done; copies on other streams go on."""

    @abstractmethod
    def synchronise(self) -> None:
        """Return when the device has nothing left to do."""


class _TorchMoment(Moment):
    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(device))


class _TorchStream(CopyStream):
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._event = torch.cuda.Event(blocking=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def follow(self, moment: Moment) -> None:
        assert isinstance(moment, _TorchMoment)
        self._stream.wait_event(moment.event)

    def synchronise(self) -> None:
        self._event.record(self._stream)
        self._event.synchronize()


@cache
def _claims(index: int) -> MemoryClaims:
    """Those of a device, which hold by torch's own limit on its caching allocator."""

    def limit(nbytes: int | None) -> None:
        _, total = torch.cuda.mem_get_info(index)
        share = 1.0 if nbytes is None else min(1.0, nbytes / total)
        torch.cuda.set_per_process_memory_fraction(share, index)

    return MemoryClaims(limit)


class TorchCudaDriver(CudaDriver):
    """CUDA as torch has it."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.claims = _claims(index)

    def describe(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name(self.device)

    def memory_nbytes(self) -> tuple[int, int]:
        """Free and total, of the driver."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """From torch's allocator, so that its limit covers it."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def trim(self) -> None:
        """Empty torch's cache on this device."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()

    def pin(self, address: int, nbytes: int) -> None:
        """cudaHostRegister, for every device."""
        with torch.cuda.device(self.device):
            # 1: cudaHostRegisterPortable.
            status = torch.cuda.cudart().cudaHostRegister(address, nbytes, 1)
        if int(status) != 0:
            # The runtime keeps the error for whoever looks next, which is torch after its next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device)
            raise PinRefusedError(f"cudaHostRegister of {nbytes:,} bytes: error {int(status)}")

    def unpin(self, address: int) -> None:
        """CudaHostUnregister."""
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(address)

    def copy_stream(self) -> CopyStream:
        """A stream of its own."""
        return _TorchStream(self.device)

    def moment(self) -> Moment:
        """An event."""
        return _TorchMoment(self.device)

    def step_graph(self) -> StepGraph:
        """A CUDA graph."""
        from offload.devices.cuda_graph import CudaGraph

        return CudaGraph(self.device)

    def finish_kernels(self) -> None:
        """Of the current stream."""
        torch.cuda.current_stream(self.device).synchronize()

    def synchronise(self) -> None:
        """Of all streams."""
        torch.cuda.synchronize(self.device)


def open_cuda(name: str) -> CudaDriver:
    """The driver of "cuda:N", or of torch's current device for "cuda".

    Raises:
        DeviceError: torch has no CUDA, or the machine no such device; says which.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceError(f'device={name!r}: expected "cuda" or "cuda:N"')
    if torch.version.cuda is None:
        raise DeviceError(
            f"device={name!r}: this torch ({torch.__version__}) was built without CUDA; install one that was, see "
            'https://pytorch.org/get-started, or load with device="host" or none'
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device={name!r}: torch finds no CUDA device; check that `nvidia-smi` lists one and that "
            "CUDA_VISIBLE_DEVICES does not hide it"
        )
    index = torch.cuda.current_device() if match["index"] is None else int(match["index"])
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f'device={name!r}: this machine has {count} CUDA devices, "cuda:0" to "cuda:{count - 1}"')
    try:
        import triton  # noqa: F401 - the kernels need it; better said now than in the first step
    except ImportError as error:
        raise DeviceError(f"device={name!r}: GPU kernels need triton: pip install 'moe-offload[gpu]'") from error
    return TorchCudaDriver(index)
