"""Host memory that plays an accelerator's: a byte budget, and a link that everything has to cross.

Its experts are computed by the CPU kernels, on the copies in its own slots, and so is its part of attention, on the
blocks in its memory, so that a run on three tiers gives the bits of a run on two, whatever is computed where.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks import pack_block, read_tokens, write_tokens
from cpu_kernels.prepared_attention import BlockLists, PreparedAttention
from formats.kv import KvLayout
from offload.devices.base import AttentionBatch, AttentionWork, Device, ExpertBatch, ExpertSums, KvAccelerator, Slab
from offload.devices.host import HostDevice
from offload.devices.host_attention import Attended, attend
from offload.devices.link import Link, LinkReader
from offload.errors import DoesNotFitError
from offload.moe.accumulate import PairAccumulator
from offload.moe.layer import ExpertsLayer
from offload.moe.routing import route
from offload.step_graph.graph import StepGraph
from offload.step_graph.recorded_graph import RecordedGraph


class HostAccelerator(KvAccelerator):
    """An accelerator without a GPU.

    Attributes:
        budget_nbytes: bytes that slabs may take.
        link: from host memory.
        memory_bytes_per_s: speed at which its own memory is said to be read, for schedules; the CPU computes in fact.
    """

    name = "host"
    copy_threads = 1

    def __init__(self, budget_nbytes: int, link: Link, memory_bytes_per_s: float = 500e9) -> None:
        self.budget_nbytes = budget_nbytes
        self.link = link
        self.memory_bytes_per_s = memory_bytes_per_s
        self._host = HostDevice()
        self._taken_nbytes = 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def allocate(self, nbytes: int) -> Slab:
        """A slab of the budget.

        Raises:
            DoesNotFitError: the budget does not hold it.
        """
        if self._taken_nbytes + nbytes > self.budget_nbytes:
            raise DoesNotFitError(
                f"vram={self.budget_nbytes}: a slab of {nbytes:,} bytes does not fit, {self._taken_nbytes:,} are in use"
            )
        slab = self._host.allocate(nbytes)
        self._taken_nbytes += nbytes
        at = bisect_right(self._starts, slab.address)
        self._starts.insert(at, slab.address)
        self._ends.insert(at, slab.address + slab.nbytes)
        return slab

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """With the CPU kernels; returns when done.

        Raises:
            ValueError: a bundle that is not in this device's memory, which a real accelerator could not read.
        """
        self._check(batch.addresses, layer.layout.nbytes, f"{layer.name}: an expert")
        self._host.run_experts(layer, batch, hidden, out)

    def _check(self, addresses: npt.NDArray[np.intp], nbytes: int, what: str) -> None:
        for address in addresses.tolist():
            at = bisect_right(self._starts, address) - 1
            if at < 0 or address + nbytes > self._ends[at]:
                raise ValueError(f"{what} at address {address:#x} is not in the accelerator's memory")

    def start_attention(self, batch: AttentionBatch) -> AttentionWork:
        """With the CPU kernels; returns when done.

        Raises:
            ValueError: a block that is not in this device's memory.
        """
        self._check(batch.addresses, batch.layout.nbytes, "a KV block")
        return Attended(attend(batch))

    def prepare_attention(
        self, lists: BlockLists, scale: float, queries: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> PreparedAttention:
        """The CPU's kernels are its own.

        Raises:
            ValueError: a block that is not in this device's memory.
        """
        self._check(lists.addresses, lists.layout.nbytes, "a KV block")
        return PreparedAttention(lists, scale, queries, out, lse)

    def read_blocks(
        self, addresses: npt.NDArray[np.int64], tokens: int, layout: KvLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, in place.

        Raises:
            ValueError: a block that is not in this device's memory.
        """
        self._check(addresses, layout.nbytes, "a KV block")
        return read_tokens(addresses, 0, tokens, layout)

    def write_tokens(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        offsets: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        first_tokens: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """With the CPU kernels, at once.

        Raises:
            ValueError: a block that is not in this device's memory; see `cpu_kernels.kv_blocks.write_tokens`, too.
        """
        self._check(addresses, layout.nbytes, "a KV block")
        write_tokens(keys, values, offsets, addresses, first_tokens, layout)

    def pack_blocks(
        self,
        sources: npt.NDArray[np.int64],
        source_layout: KvLayout,
        targets: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """With the CPU kernels, at once.

        Raises:
            ValueError: a block that is not in this device's memory.
        """
        self._check(sources, source_layout.nbytes, "a KV block")
        self._check(targets, layout.nbytes, "a KV block")
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            pack_block(source, source_layout, target, layout)

    def copy_up(self, source: npt.NDArray[np.uint8], target: int) -> None:
        """At once; blocks are some KB, for which the link is not asked."""
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """At once."""
        ctypes.memmove(target, source, nbytes)

    def copy_down_reader(self) -> LinkReader:
        """Copies that take as long as the link would; it carries as much in this direction as in the other at once."""
        return LinkReader(self.link)

    def copy_reader(self) -> LinkReader:
        """Copies that take as long as the link would."""
        return LinkReader(self.link)

    def finish_kernels(self) -> None:
        """The CPU's kernels are done when they return."""

    def host(self) -> Device:
        """Plain host memory."""
        return self._host

    def step_graph(self) -> StepGraph:
        """One whose operations are recorded."""
        return RecordedGraph()

    def sum_experts(self, sums: ExpertSums) -> None:
        """With the CPU kernels; returns when done.

        Raises:
            ValueError: a bundle that is not in this device's memory.
        """
        layer, known, chosen = sums.layer, sums.table.numpy(), sums.ids.numpy()
        # An id that there is not is a pair that nobody computes here.
        here = torch.from_numpy(np.where(known[chosen] != 0, chosen, layer.count))
        routing = route(here, sums.weights, layer.count)
        accumulator = PairAccumulator(routing, sums.hidden.shape[1])
        if routing.experts:
            rows, targets = accumulator.target(slice(None))
            batch = ExpertBatch(known[routing.experts].astype(np.intp), routing.offsets, routing.tokens, targets)
            self.run_experts(layer, batch, sums.hidden, rows)
        sums.out.copy_(accumulator.result())

    def synchronise(self) -> None:
        """Nothing runs on after a call."""
