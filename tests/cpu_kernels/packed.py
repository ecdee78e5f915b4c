"""Random packed matrices and experts, surrounded by poison, and the error that kernels may make."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.packed_linear import PackedWeights
from cpu_kernels.packed_reference import packed_linear_reference, quantised
from formats.bundle import BundleLayout
from formats.pack import pack_matrix, unpack_matrix
from formats.packed import PACKED_FORMATS, MatrixLayout

FORMATS = tuple(PACKED_FORMATS)
GUARD_NBYTES = 256


def guarded(payload: np.ndarray) -> np.ndarray:
    """A view of a copy that lies between bytes of 0xFF, at a multiple of 64 bytes."""
    storage = np.full(payload.nbytes + 2 * GUARD_NBYTES + 64, 0xFF, np.uint8)
    start = GUARD_NBYTES - (storage.ctypes.data + GUARD_NBYTES) % 64
    storage[start : start + payload.nbytes] = payload
    return storage[start : start + payload.nbytes]


@dataclass
class Matrix:
    """A packed matrix."""

    codes: np.ndarray
    scales: np.ndarray
    layout: MatrixLayout

    @property
    def weights(self) -> PackedWeights:
        return PackedWeights(torch.from_numpy(self.codes), torch.from_numpy(self.scales), self.layout)

    def assert_product(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Fail unless fp32 `out` is x times the matrix within (roundings of the sum) 2**-24 sum |w x|."""
        expected = packed_linear_reference(x, self.codes, self.scales, self.layout, bias)
        magnitudes = quantised(x, self.layout.format).abs()
        magnitudes = magnitudes @ torch.from_numpy(unpack_matrix(self.codes, self.scales, self.layout)).double().abs().T
        groups = self.layout.padded_columns // (32 if self.layout.format == "mxfp4" else 64)
        roundings = groups + 3 + (64 if self.layout.format == "fp8_e4m3" else 0)
        bound = roundings * 2.0**-24 * (magnitudes + expected.abs()) + 1e-37
        error = (out.double() - expected).abs()
        assert (error <= bound).all(), f"error {error.max():.3g}, {float((error / bound).max()):.2f} of the bound"


def random_matrix(rows: int, columns: int, format: str, seed: int = 0) -> Matrix:
    weights = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    codes, scales = pack_matrix(weights, format)
    return Matrix(guarded(codes), guarded(scales), MatrixLayout(rows, columns, format))


def random_packed_bundle(layout: BundleLayout, seed: int) -> np.ndarray:
    """uint8 [nbytes]; padding between components is 0xFF."""
    random = np.random.default_rng(seed)
    bundle = np.full(layout.nbytes + 64, 0xFF, np.uint8)
    bundle = bundle[-bundle.ctypes.data % 64 :][: layout.nbytes]

    def put(name: str, payload: np.ndarray) -> None:
        part = layout.components[name]
        bundle[part.offset : part.offset + part.nbytes] = payload.view(np.uint8)

    for name in ("gate", "up", "down") if layout.has_gate else ("up", "down"):
        rows, columns = layout.shape(name)
        weights = random.standard_normal((rows, columns)).astype(np.float32) * np.float32(columns**-0.5)
        codes, scales = pack_matrix(weights, layout.format)
        put(name, codes)
        put(f"{name}_scale", scales)
        if layout.has_bias:
            put(f"{name}_bias", random.standard_normal(rows).astype(np.float32))
    return bundle
