"""A decode step as a graph: operations of a stream that are queued once and done again and again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from offload.devices.mailbox import Stream


class StepGraph(Stream):
    """Torch's operations, the doorbell's and kernels of our own, in the order in which a step queues them.

    A step is a function without arguments that reads and writes tensors which outlive it. What it does besides
    queueing operations happens when it is captured and never again: that is what a step must be free of.
    """

    @abstractmethod
    def call(self, kernels: Callable[[], None]) -> None:
        """Within a step: queue kernels that are not torch's own; they must be there whenever they are replayed."""

    @abstractmethod
    def run(self, step: Callable[[], None]) -> None:
        """Do a step's operations once, without capturing; returns when they are done."""

    @abstractmethod
    def capture(self, step: Callable[[], None]) -> None:
        """Keep a step's operations. Whether they are done is left open.

        Raises:
            CaptureError: the step does something that a replay would not do.
        """

    @abstractmethod
    def replay(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Do the captured operations again; returns when they are done.

        Args:
            meanwhile: called once, where a device does the operations on its own while it does them.
        """
