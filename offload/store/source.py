"""What a store is converted from: anything that can fill a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from formats.bundle import BundleLayout


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one MoE layer.

    Attributes:
        module: the experts module's path in the transformers model.
        count: experts in the layer.
        layout: bytes of each.
    """

    module: str
    count: int
    layout: BundleLayout


class BundleSource(Protocol):
    """A model's experts, each by itself."""

    @property
    def identity(self) -> str:
        """Hex digest that changes whenever a weight may have changed; the store is found by it."""
        ...

    @property
    def name(self) -> str:
        """What the user called the model; kept in the manifest for people."""
        ...

    @property
    def groups(self) -> Sequence[ExpertGroup]:
        """The MoE layers in order."""
        ...

    def fill_bundle(self, group_index: int, expert: int, out: npt.NDArray[np.uint8]) -> None:
        """Write one expert's bundle; called from several threads at once.

        Args:
            group_index: index into `groups`.
            expert: expert id in the layer.
            out: uint8 [layout.nbytes]; every byte is written, padding with zeros.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError if what was read is no longer what `identity` was taken from."""
        ...
