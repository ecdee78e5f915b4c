"""Summing the experts' outputs: the same result whatever order the experts were computed in.

Floating-point sums depend on their order, and the order in which experts arrive depends on the cache and the disk.
Two ways keep the output independent of both; which one is used depends on the sizes alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from offload.moe.routing import Routing

PAIR_BUFFER_NBYTES = 16 << 20


class Accumulator(ABC):
    """Collects expert outputs of one step.

    Attributes:
        ordered: True when experts must be added in ascending order.
    """

    ordered: bool

    @abstractmethod
    def target(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the outputs of routing.experts[index] go: (fp32 [rows, H], int64 [pairs] row of each pair)."""

    @abstractmethod
    def added(self, index: int) -> None:
        """The target of routing.experts[index] has been written."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """fp32 [T, H]: sum over k of weight * expert output."""


class PairAccumulator(Accumulator):
    """Keeps every pair's output and sums once at the end, over k in its order. For few pairs."""

    ordered = False

    def __init__(self, routing: Routing, hidden: int) -> None:
        self._routing = routing
        tokens, top_k = routing.weights.shape
        self._outputs = torch.empty(tokens * top_k, hidden, dtype=torch.float32)
        if routing.dropped_rows.size:
            self._outputs[torch.from_numpy(routing.dropped_rows)] = 0.0
        self._rows = torch.from_numpy(routing.rows)

    def target(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs' own rows."""
        return self._outputs, self._rows[self._routing.pairs_of(index)]

    def added(self, index: int) -> None:
        """Nothing to do: each pair has a row of its own."""

    def result(self) -> torch.Tensor:
        """One small matrix product per token."""
        outputs = self._outputs.view(*self._routing.weights.shape, self._outputs.shape[1])
        return torch.bmm(self._routing.weights[:, None, :], outputs)[:, 0]


class OrderedAccumulator(Accumulator):
    """Adds each expert's outputs to the sum, in ascending order of experts. For many pairs."""

    ordered = True

    def __init__(self, routing: Routing, hidden: int) -> None:
        self._routing = routing
        self._sum = torch.zeros(routing.weights.shape[0], hidden, dtype=torch.float32)
        self._scratch = torch.empty(0, hidden, dtype=torch.float32)
        self._next = 0

    def target(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A scratch buffer, used again for the next expert."""
        pairs = self._routing.pairs_of(index)
        count = pairs.stop - pairs.start
        if self._scratch.shape[0] < count:
            self._scratch = torch.empty(count, self._sum.shape[1], dtype=torch.float32)
        return self._scratch, torch.arange(count)

    def added(self, index: int) -> None:
        """Add the scratch rows, weighted, to their tokens."""
        if index != self._next:
            raise RuntimeError(f"expert number {index} of the step was added, {self._next} is next")
        self._next += 1
        pairs = self._routing.pairs_of(index)
        tokens = torch.from_numpy(self._routing.tokens[pairs])
        rows = torch.from_numpy(self._routing.rows[pairs])
        outputs = self._scratch[: tokens.shape[0]]
        outputs *= self._routing.weights.view(-1)[rows, None]
        # A token goes to an expert once, so that no two of these additions meet.
        self._sum.index_add_(0, tokens, outputs)

    def result(self) -> torch.Tensor:
        """The sum."""
        return self._sum


def make_accumulator(routing: Routing, hidden: int) -> Accumulator:
    """The way of summing for this many pairs; depends on shapes only."""
    pairs = routing.weights.numel()
    if pairs * hidden * 4 <= PAIR_BUFFER_NBYTES:
        return PairAccumulator(routing, hidden)
    return OrderedAccumulator(routing, hidden)
