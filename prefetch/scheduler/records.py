"""What the scheduler is given and what it decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Home(IntEnum):
    """Where an expert's bytes are when the layer starts."""

    VRAM = 0
    """On the GPU only: the CPU cannot compute it."""
    BOTH = 1
    """On the GPU, with a copy in RAM."""
    RAM = 2
    DISK = 3
    """In neither: it is read into RAM before anything else happens to it."""


class Unit(IntEnum):
    """What computes an expert."""

    CPU = 0
    GPU = 1


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of one layer's experts, measured while the other resources are busy too.

    One resource serves one expert at a time. An expert with n tokens takes the CPU `cpu_expert_s + n cpu_token_s`, the
    first one of a layer `cpu_first_s` more, and the GPU `gpu_expert_s + n gpu_token_s`, whose first expert waits for
    `gpu_before_s` (shared experts, which run there). Infinity in `gpu_expert_s` says that there is no GPU.

    Attributes:
        cpu_token_s: CPU, each token of an expert.
        cpu_expert_s: CPU, each expert.
        cpu_first_s: CPU, once where it computes any expert: caches are cold.
        gpu_expert_s: GPU, each expert.
        gpu_token_s: GPU, each token of an expert.
        gpu_before_s: until the GPU is free for experts.
        link_expert_s: copying one expert from RAM to the GPU.
        disk_expert_s: reading one expert from disk into RAM.
        link_before_s: until the link is free: what it carries already.
        disk_before_s: until the disk is free.
    """

    cpu_token_s: float
    cpu_expert_s: float = 0.0
    cpu_first_s: float = 0.0
    gpu_expert_s: float = math.inf
    gpu_token_s: float = 0.0
    gpu_before_s: float = 0.0
    link_expert_s: float = math.inf
    disk_expert_s: float = 0.0
    link_before_s: float = 0.0
    disk_before_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            finite = name not in ("gpu_expert_s", "link_expert_s")
            if not value >= 0 or (finite and math.isinf(value)):
                raise ValueError(f"{name}={value!r}: expected seconds, 0 or more")

    @property
    def has_gpu(self) -> bool:
        """Whether anything can run on a GPU."""
        return not math.isinf(self.gpu_expert_s)

    def as_array(self) -> Floats:
        """float64 [10], in the order of the attributes, for kernels."""
        return np.array([getattr(self, name) for name in self.__dataclass_fields__], dtype=np.float64)


class Schedule(NamedTuple):
    """What happens in one layer. Experts are given by their places in the scheduler's input.

    Invariant: every expert is in exactly one of `cpu` and `gpu`; `transfers` are those of `gpu` that are not there
    yet; `reads` are those on disk.

    Attributes:
        cpu: computed by the CPU, in this order.
        gpu: computed by the GPU, in this order.
        transfers: copied to the GPU, in this order.
        reads: read from disk, in this order.
        finish_s: float64 [n], when each expert is done, from the layer's start.
        cpu_s: when the CPU is done, 0 where it computes nothing.
        gpu_s: when the GPU is done, at least `gpu_before_s`.
    """

    cpu: Ints
    gpu: Ints
    transfers: Ints
    reads: Ints
    finish_s: Floats
    cpu_s: float
    gpu_s: float

    @property
    def makespan_s(self) -> float:
        """When the layer's experts are done."""
        return max(self.cpu_s, self.gpu_s)
