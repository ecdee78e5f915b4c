"""Which candidate of tile sizes experts take on a device: the first, unless another was found to be faster there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.bundle import BundleLayout
from gpu_kernels.configs import ProductConfig, product_configs


@dataclass(frozen=True)
class Kind:
    """Steps whose tiles are cut alike.

    Attributes:
        layout: of the experts.
        itemsize: bytes of an activation.
        few: of few pairs, as decoding has them.
    """

    layout: BundleLayout
    itemsize: int
    few: bool

    @property
    def candidates(self) -> tuple[ProductConfig, ...]:
        """Best guess first."""
        return product_configs(self.layout.format, self.itemsize, few=self.few)


_chosen: dict[tuple[torch.device, Kind], ProductConfig] = {}


def choose(device: torch.device, kind: Kind, config: ProductConfig) -> None:
    """Take a candidate from now on, in every model of the process.

    Raises:
        ValueError: it is none.
    """
    if config not in kind.candidates:
        raise ValueError(f"{config} is no candidate for {kind.layout.format}")
    _chosen[device, kind] = config


def chosen(device: torch.device, kind: Kind) -> ProductConfig:
    """What is taken."""
    return _chosen.get((device, kind)) or kind.candidates[0]
