"""The device seam: what the tiers and the MoE step ask of whatever computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.prepared_attention import BlockLists, PreparedAttention
from formats.kv import KvLayout
from offload.devices.link import Link
from offload.moe.layer import ExpertsLayer
from offload.store.progress import Progress

if TYPE_CHECKING:
    from offload.step_graph.graph import StepGraph
    from offload.tiers.transfer import Reader


@dataclass(frozen=True)
class ExpertBatch:
    """Experts of one layer to compute, in place.

    Attributes:
        addresses: intp [n]; the bundle of each expert.
        offsets: int64 [n + 1]; the pairs of expert i are offsets[i] to offsets[i + 1].
        tokens: int64 [pairs]; the token that each pair reads.
        rows: int64 [pairs]; the output row that each pair writes, no row twice.
    """

    addresses: npt.NDArray[np.intp]
    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


Span = memoryview | torch.Tensor
"""Bytes of a slab that a reader fills: a memoryview of host memory, or a uint8 tensor [n] of another device."""


class Slab(ABC):
    """One large allocation of a tier, page-aligned.

    Attributes:
        nbytes: its size.
        address: of the first byte, as the device's kernels see it.
    """

    nbytes: int
    address: int

    @abstractmethod
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The slab as uint8 [nbytes], writable, without a copy; what disk reads go into.

        Raises:
            UnsupportedOperationError: the host cannot address the slab.
        """

    def span(self, offset: int, nbytes: int) -> Span:
        """A part of the slab, writable, as readers take it."""
        return memoryview(self.bytes()[offset : offset + nbytes])  # type: ignore[arg-type]

    def tensor(self) -> torch.Tensor:
        """The slab as a uint8 tensor [nbytes] on its device, without a copy."""
        return torch.from_numpy(self.bytes())

    @abstractmethod
    def discard(self, offset: int, nbytes: int) -> None:
        """Give the memory of a page-aligned range back to the system; its content is lost, its address stays."""


class Work(ABC):
    """Experts that a device computes."""

    @abstractmethod
    def finish(self) -> None:
        """Return when the outputs are where they belong."""


class Done(Work):
    """Work that was done when it was given."""

    def finish(self) -> None:
        """Nothing is left to do."""


class Device(ABC):
    """Where experts are computed and where their slots live.

    Attributes:
        name: of the device, for messages.
        slab_nbytes: how large slabs of expert slots are made, at most.
    """

    name: str
    slab_nbytes: int = 4 << 30

    @abstractmethod
    def allocate(self, nbytes: int) -> Slab:
        """A slab of at least `nbytes` bytes.

        Raises:
            DoesNotFitError: the system refuses.
        """

    @abstractmethod
    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out[rows[p]] = expert(hidden[tokens[p]]) for every pair p, without routing weights.

        Args:
            layer: whose experts they are.
            batch: which experts, and their pairs.
            hidden: [T, H] contiguous, in the layer's dtype.
            out: fp32 [R, H] contiguous; rows that no pair names are left alone.
        """

    def start_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> Work:
        """As `run_experts`, but may return before the outputs are there; bundles stay as they are until `finish`."""
        self.run_experts(layer, batch, hidden, out)
        return Done()

    @abstractmethod
    def synchronise(self) -> None:
        """Return when all work given to the device is done."""


@dataclass(frozen=True)
class ExpertSums:
    """Experts of one layer to sum, all tensors on the device that has them.

    Attributes:
        layer: whose experts they are.
        hidden: [T, H] contiguous, in the layer's dtype.
        ids: int64 [T, k] contiguous.
        weights: fp32 [T, k] contiguous.
        table: int64 [experts]: address of each bundle in the device's memory, 0 where it is not there.
        out: fp32 [T, H] contiguous.
    """

    layer: ExpertsLayer
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    out: torch.Tensor


class Accelerator(Device):
    """A device with memory of its own at the other end of a link.

    Attributes:
        link: from host memory.
        memory_bytes_per_s: speed at which its own memory is read, for schedules.
        copy_threads: copies under way at once.
    """

    link: Link
    memory_bytes_per_s: float
    copy_threads: int

    @abstractmethod
    def finish_kernels(self) -> None:
        """Return when what was computed so far no longer reads weights; copies go on."""

    @abstractmethod
    def copy_reader(self) -> Reader:
        """What a `ReadEngine` fills this device's slots from: host memory, by address."""

    @abstractmethod
    def host(self) -> Device:
        """The device of host memory that this one copies from fastest."""

    def prepare(self, layers: Sequence[ExpertsLayer], most_pairs: int, progress: Progress) -> None:
        """Compile what steps of up to so many (token, expert) pairs run, before the first of them waits for it."""

    def release(self) -> None:
        """Give back what the device took of the process beside slabs: the model was closed, or never made. May be
        called again.
        """

    @abstractmethod
    def step_graph(self) -> StepGraph:
        """An empty graph for a decode step on this device."""

    @abstractmethod
    def sum_experts(self, sums: ExpertSums) -> None:
        """out[t] = sum of weights[t, i] x expert ids[t, i] (hidden[t]) over the experts that are here.

        Kernels of a step: nothing waits, and what the tensors hold may change until a replay.
        """


@dataclass(frozen=True)
class AttentionBatch:
    """Lists of KV cache blocks to attend to, in place; see `cpu_kernels.paged_attention`.

    Attributes:
        query: [n, Hq, T, D].
        offsets: int64 [n + 1]; list i is addresses[offsets[i] : offsets[i + 1]].
        addresses: int64, of blocks, in the order of their tokens.
        lengths: int64 [n], tokens of each list.
        first_positions: int64 [n], of each list's first token.
        query_positions: int64 [n, T].
        layout: of the blocks.
        scale: of the scores.
        valid: bool [n, S], False for positions that no query sees; None for none.
    """

    query: torch.Tensor
    offsets: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    first_positions: npt.NDArray[np.int64]
    query_positions: npt.NDArray[np.int64]
    layout: KvLayout
    scale: float
    valid: npt.NDArray[np.bool_] | None


AttentionPart = tuple[torch.Tensor, torch.Tensor]
"""Attention to a part of the keys: out fp32 [n, Hq, T, V], and the log-sum-exp of its scores, fp32 [n, Hq, T]."""


class AttentionWork(ABC):
    """Attention that a device computes."""

    @abstractmethod
    def finish(self) -> AttentionPart:
        """Return when it is there, in host memory."""


class KvAccelerator(Accelerator):
    """An accelerator that attends to the blocks of a KV cache in its memory.

    Attributes:
        joins_segments: whether consecutive segments of a sequence are one list to it, which leaves less to bring to the
            host and to add up there; the last bits then depend on where blocks are.
    """

    joins_segments = False

    @abstractmethod
    def start_attention(self, batch: AttentionBatch) -> AttentionWork:
        """May return before the part is there; blocks stay as they are until `finish`."""

    def prepare_attention(
        self, lists: BlockLists, scale: float, queries: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> PreparedAttention | None:
        """Attention to the same blocks of its memory from one step to the next, by the CPU's kernels in its place;
        arguments as of `PreparedAttention`. None where it has kernels of its own.

        Raises:
            ValueError: a block that is not in this device's memory.
        """
        return None

    @abstractmethod
    def read_blocks(
        self, addresses: npt.NDArray[np.int64], tokens: int, layout: KvLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [Hk, tokens, D] and values [Hk, tokens, V] of consecutive blocks, fp32, for many new tokens."""

    @abstractmethod
    def write_tokens(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        offsets: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        first_tokens: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """As `cpu_kernels.kv_blocks.write_tokens`, into blocks in this device's memory; tensors are on any device."""

    @abstractmethod
    def pack_blocks(
        self,
        sources: npt.NDArray[np.int64],
        source_layout: KvLayout,
        targets: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """Pack full plain blocks into quantised ones, all in this device's memory, with the bytes of `formats.kv_pack`.

        Args:
            sources: int64 [n], addresses of the plain blocks.
            source_layout: of these.
            targets: int64 [n], addresses of the quantised ones.
            layout: of these; heads, widths and tokens as the sources'.
        """

    @abstractmethod
    def copy_up(self, source: npt.NDArray[np.uint8], target: int) -> None:
        """Copy bytes of host memory to an address of this device's memory; returns when they may change."""

    @abstractmethod
    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """Copy between addresses of this device's memory, before anything that is computed later."""

    @abstractmethod
    def copy_down_reader(self) -> Reader:
        """What a `ReadEngine` fills host memory from: this device's memory, by address."""
