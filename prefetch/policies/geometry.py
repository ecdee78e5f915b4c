"""How keys fall into layers, and what a miss of each expert costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Geometry:
    """Experts by layer. Keys count through all layers, as in `placement.model_spec.ModelSpec`.

    Attributes:
        counts: experts of each layer; a layer that has none has no entry, a dense model has no entries.
        reload_s: seconds to bring each expert back once it is gone, by key; None where all cost the same. Experts of
            different formats or homes differ. Only ratios matter.
    """

    counts: tuple[int, ...]
    reload_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.counts, default=1) < 1:
            raise ValueError(f"layers of {self.counts} experts: need at least one expert in each")
        if self.reload_s is not None and (len(self.reload_s) != sum(self.counts) or min(self.reload_s, default=1) <= 0):
            raise ValueError(f"reload_s of {len(self.reload_s)} experts: need a positive time for each of {self.total}")

    @classmethod
    def uniform(cls, layers: int, experts: int) -> Geometry:
        """`layers` layers of `experts` experts that cost the same."""
        return cls((experts,) * layers)

    @property
    def layers(self) -> int:
        """Layers that have experts."""
        return len(self.counts)

    @cached_property
    def total(self) -> int:
        """Experts of all layers."""
        return sum(self.counts)

    @cached_property
    def first_keys(self) -> npt.NDArray[np.int64]:
        """int64 [layers + 1]: layer l has the keys first_keys[l] to first_keys[l + 1], exclusively."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @cached_property
    def layer_of(self) -> npt.NDArray[np.int64]:
        """int64 [total]: the layer of each key."""
        return np.repeat(np.arange(self.layers, dtype=np.int64), self.counts)

    @cached_property
    def relative_cost(self) -> npt.NDArray[np.float64]:
        """float64 [total]: what a miss of each key costs, 1 on average."""
        if self.reload_s is None:
            return np.ones(self.total)
        costs = np.array(self.reload_s, dtype=np.float64)
        relative: npt.NDArray[np.float64] = costs / costs.mean()
        return relative
