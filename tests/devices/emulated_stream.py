"""Streams without a GPU: operations in order, one by one by whoever steps them, or on a thread of their own."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from offload.devices.mailbox import Stream


class SteppedStream(Stream):
    """Does one operation at a time, when it is told to."""

    def __init__(self) -> None:
        self.operations: deque[tuple[str, Callable[[], bool]]] = deque()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._add("copy", lambda: target.copy_(source) is not None)

    def write_value(self, address: int, value: int) -> None:
        def write() -> bool:
            ctypes.c_uint32.from_address(address).value = value
            return True

        self._add("write", write)

    def wait_value(self, address: int, value: int) -> None:
        self._add("wait", lambda: ctypes.c_uint32.from_address(address).value == value)

    def call(self, function: Callable[[], None]) -> None:
        """A kernel."""

        def run() -> bool:
            function()
            return True

        self._add("call", run)

    def _add(self, name: str, operation: Callable[[], bool]) -> None:
        self.operations.append((name, operation))

    def step(self) -> bool:
        """Do the next operation; False where it has to wait, or there is none."""
        if not self.operations or not self.operations[0][1]():
            return False
        self.operations.popleft()
        return True


class ThreadedStream(SteppedStream):
    """Plays a stream's thread: a pause of random length before an operation now and then, and no Python lock held."""

    def __init__(self, seed: int, most_pause_s: float) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.most_pause_s = most_pause_s

    def run(self, patience_s: float = 30.0) -> None:
        """Do all operations, on a thread of its own; raises where one waits for ever."""
        stuck: list[str] = []

        def work() -> None:
            deadline = time.monotonic() + patience_s
            while self.operations:
                if self.random.random() < 0.2:
                    time.sleep(self.random.random() * self.most_pause_s)
                while not self.step():
                    if time.monotonic() > deadline:
                        stuck.append(self.operations[0][0])
                        return
                    time.sleep(0)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not stuck, f"the stream waits for ever at {stuck[0]}"


def poisoned(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, np.nan)
