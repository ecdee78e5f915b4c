"""Attention of a few new tokens to blocks of a KV cache, by the CPU kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpu_kernels.paged_attention import paged_attention
from offload.devices.base import AttentionBatch, AttentionPart, AttentionWork
from offload.devices.host_threads import kernel_pool


def attend(
    batch: AttentionBatch, into: AttentionPart | None = None, rows: npt.NDArray[np.int64] | None = None
) -> AttentionPart:
    """On the calling thread and the kernels' workers; the query is on the CPU.

    Args:
        batch: what to attend to.
        into: contiguous memory to write to; None for new memory.
        rows: int64 [n], the sequence of each list, of which the batch's query and mask have one row each; None: the
            batch has rows of each list.
    """
    return paged_attention(
        batch.query, batch.offsets, batch.addresses, batch.lengths, batch.first_positions, batch.query_positions,
        batch.layout, batch.scale, valid=batch.valid, rows=rows, into=into,
        pool=kernel_pool(),
    )  # fmt: skip


class Attended(AttentionWork):
    """Attention that was computed when it was asked for."""

    def __init__(self, part: AttentionPart) -> None:
        self._part = part

    def finish(self) -> AttentionPart:
        """The part."""
        return self._part
