"""Random experts in bundles, between poison, and the table of their addresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from formats.bundle import BundleLayout
from formats.pack import pack_matrix
from gpu_kernels.launch import DTYPE_OF_FORMAT

POISON = 0xFF
"""Decodes to NaN in every element format, in bf16 scales and in e8m0 scales."""


def activations_of(format: str) -> tuple[torch.dtype, ...]:
    """What kernels take beside weights of a format; that of elements is their own."""
    if format in DTYPE_OF_FORMAT:
        return (DTYPE_OF_FORMAT[format],)
    return torch.bfloat16, torch.float16, torch.float32


def random_bundle(layout: BundleLayout, seed: int) -> np.ndarray:
    """uint8 [nbytes]; padding between components is poison."""
    random = np.random.default_rng(seed)
    bundle = np.full(layout.nbytes, POISON, np.uint8)

    def put(name: str, payload: np.ndarray) -> None:
        part = layout.components[name]
        bundle[part.offset : part.offset + part.nbytes] = payload.reshape(-1).view(np.uint8)

    def elements(values: np.ndarray, format: str) -> np.ndarray:
        return torch.from_numpy(values).to(DTYPE_OF_FORMAT[format]).reshape(-1).view(torch.uint8).numpy()

    for name in ("gate", "up", "down") if layout.has_gate else ("up", "down"):
        rows, columns = layout.shape(name)
        weights = (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        if layout.is_packed:
            codes, scales = pack_matrix(weights, layout.format)
            put(name, codes)
            put(f"{name}_scale", scales)
        else:
            put(name, elements(weights, layout.format))
        if layout.has_bias:
            put(f"{name}_bias", elements(random.standard_normal(rows).astype(np.float32), layout.bias_element.name))
    return bundle


@dataclass
class Slots:
    """Bundles in slots of one slab, in a shuffled order, with poison in the slots between."""

    layout: BundleLayout
    bundles: list[np.ndarray]
    slab: torch.Tensor
    table: torch.Tensor


def fill_slots(layout: BundleLayout, experts: int, device: torch.device, absent: tuple[int, ...] = ()) -> Slots:
    """Experts 0 to `experts` - 1, those in `absent` without a slot."""
    slot_nbytes = layout.nbytes + 4096
    bundles = [random_bundle(layout, seed) for seed in range(experts)]
    slab = torch.full((slot_nbytes * 2 * experts + 64,), POISON, dtype=torch.uint8, device=device)
    base = -slab.data_ptr() % 64
    table = torch.zeros(experts, dtype=torch.int64)
    for expert, slot in enumerate(np.random.default_rng(experts).permutation(2 * experts)[:experts]):
        if expert in absent:
            continue
        start = base + int(slot) * slot_nbytes
        slab[start : start + layout.nbytes] = torch.from_numpy(bundles[expert]).to(device)
        table[expert] = slab.data_ptr() + start
    return Slots(layout, bundles, slab, table.to(device))


def tolerance_format(dtype: torch.dtype) -> str:
    """The tolerance of results in this dtype of computing."""
    return {value: key for key, value in DTYPE_OF_FORMAT.items()}[dtype]
