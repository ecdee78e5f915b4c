"""What the runtime hangs on one experts module of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.bundle import BundleLayout


@dataclass(frozen=True, eq=False)
class ExpertsLayer:
    """One MoE layer.

    Attributes:
        name: the experts module's path in the model.
        first_key: key of its expert 0; expert e has key first_key + e.
        count: experts.
        layout: bytes of one.
        dtype: in which the model computes.
        module: the transformers module; its parameters are gone, its gate is used.
        activation: the kernels' name of its gate, None where only the module itself knows it.
    """

    name: str
    first_key: int
    count: int
    layout: BundleLayout
    dtype: torch.dtype
    module: torch.nn.Module
    activation: str | None
