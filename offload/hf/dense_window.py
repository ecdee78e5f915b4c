"""Decoder layers whose dense weights stream through an accelerator's memory in every pass.

The order is known: one layer after the other, pass after pass. While a layer computes, the next one that streams is on
its way. A pass that begins elsewhere, because the last one failed, finds the window with other layers, which are then
loaded anew.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from torch import nn

from offload.devices.base import Accelerator
from offload.devices.link import CHUNK_NBYTES
from offload.hf.dense_weights import DenseWeights
from offload.tiers.transfer import ReadEngine, ReadRequest, Ticket, Urgency


class DenseWindow:
    """Slots for a few layers, and copies that fill them.

    Attributes:
        loads: layers that were copied.
        waits: of them, those that were waited for.
    """

    def __init__(self, accelerator: Accelerator, layers: Sequence[nn.Module], slots: int) -> None:
        """Move the layers' weights to one block each of host memory, from which copies are fastest.

        Args:
            accelerator: whose memory the window is in.
            layers: those that stream, in the order of a pass; more than `slots`.
            slots: at least 2.
        """
        self._accelerator = accelerator
        self._weights = [DenseWeights([layer]) for layer in layers]
        self._homes = [weights.move_to(accelerator.host()) for weights in self._weights]
        largest = max(weights.nbytes for weights in self._weights)
        self._slots = [accelerator.allocate(largest) for _ in range(slots)]
        self._engine = ReadEngine(
            accelerator.copy_reader(), threads=accelerator.copy_threads, chunk_nbytes=CHUNK_NBYTES
        )  # fmt: skip
        self._holds: list[int | None] = [None] * slots
        self._tickets: dict[int, Ticket] = {}
        # A layer at a time, whichever threads generate: its tensors point to a slot meanwhile.
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.loads = 0
        self.waits = 0
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._enter, number))
            layer.register_forward_hook(functools.partial(self._leave, number), always_call=True)

    @property
    def bytes_copied(self) -> int:
        """Bytes that crossed the link."""
        return self._engine.reader.bytes_read

    def _load(self, number: int, slot: int) -> None:
        weights, home = self._weights[number], self._homes[number]
        out = self._slots[slot].span(0, weights.nbytes)
        before = self._holds[slot]
        if before is not None:
            del self._tickets[before]
        self._holds[slot] = number
        request = ReadRequest(0, home.address, out, None, f"the dense weights of streamed layer {number}")
        self._tickets[number] = self._engine.submit(request, Urgency.NOW)
        self.loads += 1

    def _enter(self, number: int, _module: nn.Module, _args: Any) -> None:
        """Before a layer: its weights are there, and the next one's are on their way."""
        if self._owner != threading.get_ident():
            # Otherwise an interrupt ended this thread's last layer, and no hook came after it.
            self._lock.acquire()
            self._owner = threading.get_ident()
        try:
            if number not in self._holds:
                self._start_anew(number)
            ticket = self._tickets[number]
            self.waits += not ticket.finished
            self._engine.wait_all([ticket])
            if not ticket.succeeded:
                self._forget()
                raise (
                    ticket.error if ticket.error is not None else RuntimeError("a copy of dense weights was cancelled")
                )
            self._weights[number].point_to(self._slots[self._holds.index(number)].tensor())
        except BaseException:
            # The hook after the layer runs all the same, and lets go.
            self._weights[number].point_to(self._homes[number].tensor())
            raise

    def _start_anew(self, number: int) -> None:
        self._forget()
        for ahead, slot in enumerate(range(len(self._slots))):
            self._load((number + ahead) % len(self._weights), slot)

    def _forget(self) -> None:
        self._engine.cancel_all()
        self._tickets.clear()
        self._holds = [None] * len(self._slots)

    def _leave(self, number: int, _module: nn.Module, _args: Any, _output: Any) -> None:
        """After a layer: its slot is for the one that comes next but as many as the window has."""
        try:
            self._weights[number].point_to(self._homes[number].tensor())
            if number in self._holds:
                self._accelerator.finish_kernels()
                slot = self._holds.index(number)
                following = (number + len(self._slots)) % len(self._weights)
                if following not in self._holds:
                    self._load(following, slot)
        finally:
            self._owner = None
            self._lock.release()

    def close(self) -> None:
        """Stop copying; layers keep their weights in host memory."""
        self._engine.close()
