"""What torch's products in bf16 reach on the shapes of a prompt's experts, and what the card's memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_timing import replayed, seconds_of


@dataclass(frozen=True)
class ExpertProducts:
    """The products of one layer's experts: gate | up of their tokens, and down of what comes of it.

    Attributes:
        hidden: H.
        intermediate: I.
        tokens_of: tokens of each expert; none for some.
    """

    hidden: int
    intermediate: int
    tokens_of: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Operations, a fused multiply-add counted as two."""
        return 6.0 * sum(self.tokens_of) * self.hidden * self.intermediate

    @property
    def experts(self) -> int:
        """Experts that have tokens, whose weights are read."""
        return sum(tokens > 0 for tokens in self.tokens_of)

    def memory_bound_s(self, expert_nbytes: int, bytes_per_s: float) -> float:
        """Seconds in which every expert's weights are read once: no way of computing takes less.

        Args:
            expert_nbytes: of an expert's weights, in whatever format.
            bytes_per_s: of the card's memory.
        """
        return self.experts * expert_nbytes / bytes_per_s


@dataclass(frozen=True)
class TorchSeconds:
    """Seconds of torch's products in bf16, medians; kernels started by a graph where nothing else is said.

    Attributes:
        one_product: as if all tokens had one and the same expert: tokens times one matrix of the three's size.
        by_expert: two products an expert, M = its tokens: the same shapes as the experts'.
        by_expert_from_python: the same, each product started from Python.
        grouped: torch's grouped products, one call for gate | up and one for down; None where it has none.
        why_not_grouped: what it said then; empty where it has.
    """

    one_product: float
    by_expert: float
    by_expert_from_python: float
    grouped: float | None
    why_not_grouped: str = ""


def torch_seconds(products: ExpertProducts, device: torch.device, rounds: int) -> TorchSeconds:
    """Time torch's ways; every expert has weights of its own, so that they come from memory.

    Args:
        products: the shapes.
        device: where.
        rounds: repeats.
    """
    hidden, width, rows = products.hidden, products.intermediate, sum(products.tokens_of)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, h, whole = made(rows, hidden), made(rows, width), made(hidden, 3 * width)
    into, down = made(len(products.tokens_of), hidden, 2 * width), made(len(products.tokens_of), width, hidden)
    xs, hs = x.split(products.tokens_of), h.split(products.tokens_of)
    used = [index for index, tokens in enumerate(products.tokens_of) if tokens]

    def by_expert(_: int) -> None:
        for index in used:
            torch.mm(xs[index], into[index])
            torch.mm(hs[index], down[index])

    ends = torch.tensor(products.tokens_of).cumsum(0).to(torch.int32).to(device)

    def grouped(_: int) -> None:
        function: Any = torch._grouped_mm
        function(x, into, offs=ends)
        function(h, down, offs=ends)

    def graph_s(call: Any) -> float:
        return seconds_of(replayed(call, device, 1), device, rounds).median

    found, why = None, ""
    try:
        grouped(0)
        found = graph_s(grouped)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        # torch or the card has none; the report says so beside the others.
        why = str(error).splitlines()[0]
    return TorchSeconds(
        graph_s(lambda _: torch.mm(x, whole)), graph_s(by_expert), seconds_of(by_expert, device, rounds).median,
        found, why,
    )  # fmt: skip
