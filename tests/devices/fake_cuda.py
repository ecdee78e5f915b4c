"""A CUDA driver whose device is host memory: copies that are late, memory that runs out, pinning that is refused."""

from __future__ import annotations

import threading
import weakref

import torch

from offload.devices.cuda_driver import CopyStream, CudaDriver, Moment, PinRefusedError
from offload.devices.memory_claims import MemoryClaims
from offload.step_graph.graph import StepGraph
from offload.step_graph.recorded_graph import RecordedGraph


class FakeMoment(Moment):
    """One of all that a driver was asked for."""


class FakeStream(CopyStream):
    """Copies when it is synchronised, not before: whoever does not wait finds what was there."""

    def __init__(self, driver: FakeCudaDriver) -> None:
        self._driver = driver
        self._queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._queued.append((target, source))

    def follow(self, moment: Moment) -> None:
        with self._driver.lock:
            self._driver.followed.append(moment)

    def synchronise(self) -> None:
        for target, source in self._queued:
            target.copy_(source)
            with self._driver.lock:
                self._driver.copies.append((source.data_ptr(), len(source)))
        self._queued.clear()


class FakeCudaDriver(CudaDriver):
    """Attributes say what happened, and what is to go wrong.

    Attributes:
        total_nbytes: of the device.
        pinnable_nbytes: that the system locks, at most.
        pinned: bytes by address.
        copies: (address, bytes) of every copy.
        moments: that it was asked for, in order.
        followed: those that copies waited for.
        refuse: allocations that are refused from the next one on.
    """

    def __init__(self, total_nbytes: int = 1 << 30, pinnable_nbytes: int = 1 << 40) -> None:
        self.device = torch.device("cpu")
        self.total_nbytes = total_nbytes
        self.pinnable_nbytes = pinnable_nbytes
        self.pinned: dict[int, int] = {}
        self.copies: list[tuple[int, int]] = []
        self.moments: list[Moment] = []
        self.followed: list[Moment] = []
        self.refuse = 0
        self.limit_nbytes = total_nbytes
        self.claims = MemoryClaims(self._limit)
        self.trims = 0
        self.lock = threading.Lock()
        self._used_nbytes = 0

    def describe(self) -> str:
        return "a fake"

    def memory_nbytes(self) -> tuple[int, int]:
        return self.total_nbytes - self._used_nbytes, self.total_nbytes

    def _limit(self, nbytes: int | None) -> None:
        self.limit_nbytes = self.total_nbytes if nbytes is None else nbytes

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self.refuse or self._used_nbytes + nbytes > self.limit_nbytes:
            self.refuse = max(0, self.refuse - 1)
            raise torch.OutOfMemoryError("out of memory")
        self._used_nbytes += nbytes
        memory = self._poisoned(nbytes)
        weakref.finalize(memory, self._release, nbytes)
        return memory

    def _release(self, nbytes: int) -> None:
        self._used_nbytes -= nbytes

    @staticmethod
    def _poisoned(nbytes: int) -> torch.Tensor:
        # All bits set is a NaN in every format.
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def trim(self) -> None:
        self.trims += 1

    def pin(self, address: int, nbytes: int) -> None:
        if sum(self.pinned.values()) + nbytes > self.pinnable_nbytes:
            raise PinRefusedError("no more")
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def copy_stream(self) -> CopyStream:
        return FakeStream(self)

    def moment(self) -> Moment:
        self.moments.append(FakeMoment())
        return self.moments[-1]

    def step_graph(self) -> StepGraph:
        return RecordedGraph()

    def finish_kernels(self) -> None:
        pass

    def synchronise(self) -> None:
        pass
