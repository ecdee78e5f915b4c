"""Summing the experts' outputs: the same result whatever order the experts were computed in.

Floating-point sums depend on their order, and the order in which experts arrive depends on the cache and the disk.
Two ways keep the output independent of both; which one is used depends on the sizes alone.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch

from cpu_kernels.weighted_sum import add_weighted, weighted_sum
from offload.devices.host_threads import kernel_pool
from offload.moe.routing import Ints, Routing
from placement.outputs import GROUP_NBYTES, kept_nbytes

_thread = threading.local()


class Accumulator(ABC):
    """Collects expert outputs of one step.

    Attributes:
        ordered: True when experts must be added in ascending order.
        most_pairs: pairs of several experts that may be added at once where that is so.
    """

    ordered: bool
    most_pairs: int

    @abstractmethod
    def target(self, pairs: Ints | slice) -> tuple[torch.Tensor, Ints]:
        """Where the outputs of some pairs go: (fp32 [rows, H], int64 [pairs] row of each pair)."""

    @abstractmethod
    def added(self, pairs: Ints | slice) -> None:
        """The target of these pairs has been written."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """fp32 [T, H]: sum over k of weight * expert output."""


class PairAccumulator(Accumulator):
    """Keeps every pair's output and sums once at the end, over k in its order. For few pairs."""

    ordered = False

    def __init__(self, routing: Routing, hidden: int) -> None:
        self.most_pairs = routing.weights.numel()
        self._routing = routing
        self._outputs = _kept_rows(routing.weights.numel(), hidden)
        if routing.dropped_rows.size:
            self._outputs[torch.from_numpy(routing.dropped_rows)] = 0.0

    def target(self, pairs: Ints | slice) -> tuple[torch.Tensor, Ints]:
        """The pairs' own rows."""
        return self._outputs, self._routing.rows[pairs]

    def added(self, pairs: Ints | slice) -> None:
        """Nothing to do: each pair has a row of its own."""

    def result(self) -> torch.Tensor:
        """Summed over k in its order."""
        return weighted_sum(self._outputs, self._routing.weights, kernel_pool())


def _kept_rows(rows: int, hidden: int) -> torch.Tensor:
    """fp32 [rows, hidden] that nobody wrote; the same memory for every step of a thread, whose steps do not overlap.

    Memory that is new to the process costs a prompt's step as much as summing its outputs.
    """
    kept: torch.Tensor | None = getattr(_thread, "rows", None)
    if kept is None or kept.numel() < rows * hidden:
        # Whoever comes next may not be in inference mode.
        with torch.inference_mode(mode=False):
            kept = torch.empty(rows * hidden, dtype=torch.float32, device="cpu")
        _thread.rows = kept
    return kept[: rows * hidden].view(rows, hidden)


class OrderedAccumulator(Accumulator):
    """Adds some experts' outputs to the sum at a time, in ascending order of experts. For many pairs.

    Attributes:
        hidden: numbers of an output.
    """

    ordered = True

    def __init__(self, routing: Routing, hidden: int) -> None:
        self.most_pairs = GROUP_NBYTES // (4 * hidden)
        self.hidden = hidden
        self._routing = routing
        self._done = 0

    @cached_property
    def _sum(self) -> torch.Tensor:
        return torch.zeros(self._routing.weights.shape[0], self.hidden, dtype=torch.float32, device="cpu")

    def target(self, pairs: Ints | slice) -> tuple[torch.Tensor, Ints]:
        """Scratch memory, used again for the next experts."""
        count = len(self._routing.rows[pairs])
        self._scratch = _kept_rows(count, self.hidden)
        return self._scratch, np.arange(count)

    def added(self, pairs: Ints | slice) -> None:
        """Add the scratch rows, weighted, to their tokens.

        Raises:
            RuntimeError: pairs were left out, or come twice.
        """
        self.add(pairs, self._scratch)

    def add(self, pairs: Ints | slice, outputs: torch.Tensor) -> None:
        """Add the outputs of pairs that are next, fp32 [at least pairs, H], weighted.

        Raises:
            RuntimeError: as `added`.
        """
        rows = self._take_turn(pairs)
        tokens = self._routing.tokens[pairs]
        add_weighted(self._sum, outputs[: len(rows)], self._routing.weights, rows, tokens, kernel_pool())

    def _take_turn(self, pairs: Ints | slice) -> Ints:
        """Rows of pairs that are next."""
        rows = self._routing.rows[pairs]
        expected = self._routing.rows[self._done : self._done + len(rows)]
        if not np.array_equal(rows, expected):
            raise RuntimeError(f"experts were added out of order: pair {self._done} of the step is next")
        self._done += len(rows)
        return rows

    def result(self) -> torch.Tensor:
        """The sum."""
        return self._sum


class KeptAccumulator(OrderedAccumulator):
    """Is given outputs in ascending order of experts, but keeps them and sums as `PairAccumulator`.

    With an accelerator, for as many pairs as a host keeps alone, whose bits it has.
    """

    def __init__(self, routing: Routing, hidden: int) -> None:
        super().__init__(routing, hidden)
        self._pairs = PairAccumulator(routing, hidden)

    def target(self, pairs: Ints | slice) -> tuple[torch.Tensor, Ints]:
        """The pairs' own rows."""
        return self._pairs.target(pairs)

    def added(self, pairs: Ints | slice) -> None:
        """Nothing is to be done but to see that they are next."""
        self._take_turn(pairs)

    def add(self, pairs: Ints | slice, outputs: torch.Tensor) -> None:
        """Keep the outputs of pairs that are next."""
        rows = self._take_turn(pairs)
        self._pairs.target(pairs)[0][torch.from_numpy(rows)] = outputs[: len(rows)]

    def result(self) -> torch.Tensor:
        """Summed over k in its order."""
        return self._pairs.result()


def make_accumulator(routing: Routing, hidden: int, *, accelerated: bool = False) -> Accumulator:
    """The way of summing for this many pairs; what comes out depends on shapes only."""
    nbytes = routing.weights.numel() * hidden * 4
    if nbytes <= kept_nbytes(accelerated=accelerated):
        return PairAccumulator(routing, hidden)
    if nbytes <= kept_nbytes(accelerated=False):
        return KeptAccumulator(routing, hidden)
    return OrderedAccumulator(routing, hidden)
