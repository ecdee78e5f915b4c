"""What is measured, handed in from the floor that runs it: the runtime's own kernels, reader and forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from placement.disk import Overlap
from placement.hardware_profile import HardwareProfile, Overheads


@dataclass(frozen=True)
class Product:
    """Calls that multiply weights which are not in the CPU's caches.

    Attributes:
        weights: that one call multiplies.
        run: `calls` calls; every call takes other weights.
        entries: inputs and outputs of a token; 0 where they are not told apart.
        calls: that are made at once, in a row.
        items: experts of one call; 0 for linear layers.
    """

    weights: int
    run: Callable[[], object]
    entries: int = 0
    calls: int = 1
    items: int = 0


@dataclass(frozen=True)
class Attention:
    """Calls of one layer's attention.

    Attributes:
        kv_nbytes: cached keys and values that a call reads.
        flops: of a call.
        run: `calls` calls.
        calls: that are made at once, in a row.
        scores: of a call: pairs of a query, of each head, and a key.
    """

    kv_nbytes: int
    flops: float
    run: Callable[[], object]
    calls: int = 1
    scores: float = 0.0


@dataclass(frozen=True)
class WholePasses:
    """What whole forward passes tell of a machine.

    Attributes:
        overheads: what they take beyond what is predicted of their parts.
        many: what reads and kernels of several tokens leave each other, where experts come from disk.
    """

    overheads: Overheads
    many: Overlap


class Kernels(Protocol):
    """What a runtime computes on one device.

    Attributes:
        formats: in which experts and linear layers are measured.
    """

    formats: Sequence[str]

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        """`count` experts of one layer, each with `tokens` tokens; narrow ones have few weights for each entry."""
        ...

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        """A linear layer of `rows` outputs."""
        ...

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        """One sequence's new tokens, which attend to cached ones and themselves; narrow heads have few products for
        each score.
        """
        ...

    def stream(self) -> float:
        """Bytes per second at which the device reads its memory once."""
        ...


class Subjects(Kernels, Protocol):
    """A runtime to measure on the host."""

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        """Seconds to read that many blocks from random places of the disk."""
        ...

    def read_first(self, nbytes: int) -> float:
        """Bytes per second of reading so much that was not read before; `read` reads nothing else from then on."""
        ...

    def beside_kernels(self, call: Callable[[], float], format: str, count: int, tokens: int) -> tuple[float, float]:
        """What `call` returns while experts of a format are computed, `count` in a call with so many tokens each, and
        the share of their speed alone that these then have.
        """
        ...

    def block_attention(self, format: str, cached_tokens: int, *, narrow: bool = False) -> Attention:
        """One token of one sequence, which attends to so many cached ones in blocks of a format."""
        ...

    def between_reads(self, read: Callable[[], float], format: str) -> float:
        """The share of their speed that linear layers of one token have right after `read`, at most 1."""
        ...

    def small_pass(self, tokens: int) -> Callable[[], object]:
        """A forward pass of so many tokens through a model so small that products are little of it."""
        ...

    def passes(self, profile: HardwareProfile, quant: str | None) -> WholePasses:
        """Measure whole forward passes.

        Args:
            profile: what it predicts of passes is taken off; its overheads are zero.
            quant: format of the model's weights; None for bf16.
        """
        ...
