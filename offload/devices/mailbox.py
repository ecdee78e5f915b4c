"""The mailbox of the doorbell, and the stream's side: ring with hidden states and routing, collect sums.

See `cpu_kernels/doorbell_kernel.py` for the words and docs/gpu.md for the order in which memory is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import doorbell_kernel as kernel

_LINE_NBYTES = 128


@dataclass(frozen=True)
class MailboxLayout:
    """Bytes of a mailbox: the bell's words, then hidden states, ids, weights and sums, each from a line of its own.

    Attributes:
        tokens: T, of every step; a captured graph has a mailbox of its own.
        top_k: k.
        hidden: H.
        dtype: of hidden states.
    """

    tokens: int
    top_k: int
    hidden: int
    dtype: torch.dtype

    @property
    def pairs(self) -> int:
        """(token, expert) pairs of a request."""
        return self.tokens * self.top_k

    def offsets(self) -> tuple[int, int, int, int, int]:
        """Of hidden states [T, H], ids int64 [T, k], weights fp32 [T, k], sums fp32 [T, H]; and the end."""
        at = kernel.CONTENT
        offsets = []
        for nbytes in (
            self.tokens * self.hidden * self.dtype.itemsize, 8 * self.pairs, 4 * self.pairs,
            4 * self.tokens * self.hidden,
        ):  # fmt: skip
            offsets.append(at)
            at += -(-nbytes // _LINE_NBYTES) * _LINE_NBYTES
        return offsets[0], offsets[1], offsets[2], offsets[3], at

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.offsets()[-1]


def mailbox_memory(layout: MailboxLayout, device: torch.device) -> npt.NDArray[np.uint8]:
    """uint8 [layout.nbytes] of zeros from a line on; of a GPU pinned, and mapped, so that it can be written from there.

    The runtime cuts its mailboxes from memory that it has locked for more than them; this is for one alone.
    """
    room = layout.nbytes + _LINE_NBYTES
    if device.type == "cuda":
        with torch.cuda.device(device):
            memory = torch.zeros(room, dtype=torch.uint8, pin_memory=True).numpy()
    else:
        memory = np.zeros(room, np.uint8)
    return memory[-memory.ctypes.data % _LINE_NBYTES :][: layout.nbytes]


class Mailbox:
    """A mailbox in memory that the CPU and a stream both see; pinned and mapped where the stream is a GPU's.

    Attributes:
        layout: its bytes.
        address: of its first byte; the same on both sides (unified addressing).
        hidden, ids, weights: what a request brings, views of the memory.
        sums: what an answer brings, likewise.
    """

    def __init__(self, layout: MailboxLayout, memory: npt.NDArray[np.uint8]) -> None:
        """Clear the bell.

        Raises:
            ValueError: memory that is too small or does not begin on a line.
        """
        self.address = int(memory.ctypes.data)
        if memory.nbytes < layout.nbytes or self.address % _LINE_NBYTES:
            raise ValueError(f"a mailbox takes {layout.nbytes} bytes from a multiple of {_LINE_NBYTES} on")
        self.layout = layout
        self._memory = memory
        memory[: kernel.CONTENT] = 0
        whole = torch.from_numpy(memory)
        hidden, ids, weights, sums, _ = layout.offsets()
        shape = layout.tokens, layout.hidden

        def view(at: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
            return whole[at : at + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

        self.hidden = view(hidden, layout.dtype, *shape)
        self.ids = view(ids, torch.int64, layout.tokens, layout.top_k)
        self.weights = view(weights, torch.float32, layout.tokens, layout.top_k)
        self.sums = view(sums, torch.float32, *shape)

    @property
    def request(self) -> int:
        """Address of the word that the stream writes."""
        return self.address + kernel.REQUEST

    @property
    def reply(self) -> int:
        """Address of the word that the server writes."""
        return self.address + kernel.REPLY

    def take_status(self) -> int:
        """The status that answers left since it was last taken; call while no request is under way."""
        word = self._memory[kernel.STATUS : kernel.STATUS + 4].view(np.uint32)
        status = int(word[0])
        word[0] = kernel.FINE
        return status


class Stream(ABC):
    """What the doorbell asks of a stream: operations that happen in the order of the calls, some time later."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between tensors of either side, of one shape and dtype."""

    @abstractmethod
    def write_value(self, address: int, value: int) -> None:
        """Write a uint32, after all that the stream wrote before it can be seen."""

    @abstractmethod
    def wait_value(self, address: int, value: int) -> None:
        """Go on when the uint32 at an address is `value`; what was written before it can be seen from then on."""


def ring(
    stream: Stream, box: Mailbox, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Hand a layer's hidden states and routing over; what follows on the stream runs while the CPU computes.

    Args:
        stream: the accelerator's.
        box: whose last answer was collected.
        layer: as the server counts them.
        hidden: [T, H].
        ids: int64 [T, k]; -1 for pairs that nobody computes.
        weights: fp32 [T, k].
    """
    stream.copy(box.hidden, hidden)
    stream.copy(box.ids, ids)
    stream.copy(box.weights, weights)
    stream.write_value(box.request, layer + 1)


def collect(stream: Stream, box: Mailbox, layer: int, sums: torch.Tensor) -> None:
    """Wait for the answer to `ring` and take the sums, fp32 [T, H]."""
    stream.wait_value(box.reply, layer + 1)
    stream.write_value(box.reply, 0)
    stream.copy(sums, box.sums)
