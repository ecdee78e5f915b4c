"""Which part of a model lives where: what costs are computed of and the planner chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Homes:
    """Where everything lives; what is not named here lives in RAM, and every expert on disk besides.

    An expert in a slot of VRAM has none in RAM. A layer's KV cache is in VRAM only if its dense weights are.

    Attributes:
        dense_in_vram: decoder layers whose dense weights are in VRAM, by index, ascending.
        kv_in_vram: those of them whose KV cache is there too.
        head_in_vram: the output layer.
        vram_slots: expert slots in VRAM.
        ram_slots: expert slots in RAM.
        read_chunk_nbytes: reads are cut into pieces of this size.
        reader_threads: reads in flight.
        dense_streamed: those layers of `dense_in_vram` that are not there for good, but cross the link in every pass.
    """

    dense_in_vram: tuple[int, ...]
    kv_in_vram: tuple[int, ...]
    head_in_vram: bool
    vram_slots: int
    ram_slots: int
    read_chunk_nbytes: int
    reader_threads: int
    dense_streamed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.kv_in_vram) <= set(self.dense_in_vram):
            raise ValueError("a layer's KV cache is in VRAM only together with its dense weights")
        if not set(self.dense_streamed) <= set(self.dense_in_vram):
            raise ValueError("a layer that streams through VRAM computes there")
        if self.vram_slots < 0 or self.ram_slots < 0:
            raise ValueError("a number of slots cannot be negative")

    @property
    def uses_vram(self) -> bool:
        """Whether anything lives there."""
        return bool(self.dense_in_vram) or self.head_in_vram or self.vram_slots > 0
