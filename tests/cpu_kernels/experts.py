"""Random experts in bundles whose every byte outside the components is poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpu_kernels.expert_mlp_reference import TORCH_DTYPES, expert_mlp_reference
from formats.bundle import BundleLayout


def encode(values: torch.Tensor, format: str) -> np.ndarray:
    """A tensor as the array type that kernels take."""
    stored = values.to(TORCH_DTYPES[format]).contiguous()
    return stored.view(torch.uint16).numpy() if format == "bf16" else stored.numpy()


def random_bundle(layout: BundleLayout, generator: torch.Generator) -> np.ndarray:
    """uint8 [nbytes]; the padding decodes to NaN in every format."""
    bundle = np.full(layout.nbytes, 0xFF, np.uint8)
    for part in layout.components.values():
        scale = part.shape[1] ** -0.5 if len(part.shape) == 2 else 0.5
        values = torch.randn(part.shape, generator=generator, dtype=torch.float64) * scale
        bundle[part.offset : part.offset + part.nbytes] = encode(values, layout.format).reshape(-1).view(np.uint8)
    return bundle


@dataclass
class Call:
    """Arguments of one call of expert_mlp, and what they were made of."""

    layout: BundleLayout
    storage: list[np.ndarray]
    bundles: np.ndarray
    pair_offsets: np.ndarray
    pair_tokens: np.ndarray
    x: np.ndarray
    pair_rows: np.ndarray
    exact_x: torch.Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.bundles, self.layout, self.pair_offsets, self.pair_tokens, self.x

    def poisoned(self, columns: int, rows: int | None = None) -> np.ndarray:
        """An output of NaN."""
        return np.full((len(self.pair_tokens) if rows is None else rows, columns), np.nan, np.float32)

    def expected(self, activation: str) -> torch.Tensor:
        """What the rows of the output must hold, [P, H] in float64."""
        result = torch.full((len(self.pair_rows), self.layout.hidden), torch.nan, dtype=torch.float64)
        for expert, bundle in enumerate(self.storage):
            pairs = slice(self.pair_offsets[expert], self.pair_offsets[expert + 1])
            inputs = self.exact_x[self.pair_tokens[pairs]]
            result[self.pair_rows[pairs]] = expert_mlp_reference(bundle, self.layout, inputs, activation)
        return result


def random_call(layout: BundleLayout, tokens_of_experts: list[int], seed: int = 0) -> Call:
    """A call with these numbers of pairs, tokens drawn at random and output rows in random order."""
    generator = torch.Generator().manual_seed(seed)
    storage = [random_bundle(layout, generator) for _ in tokens_of_experts]
    pairs = sum(tokens_of_experts)
    tokens = max(1, pairs // 2)
    exact = torch.randn(tokens, layout.hidden, generator=generator, dtype=torch.float64)
    exact = exact.to(TORCH_DTYPES[layout.format]).to(torch.float64)
    return Call(
        layout=layout,
        storage=storage,
        bundles=np.array([bundle.ctypes.data for bundle in storage], np.intp),
        pair_offsets=np.cumsum([0, *tokens_of_experts]),
        pair_tokens=torch.randint(0, tokens, (pairs,), generator=generator).numpy(),
        x=encode(exact, layout.format),
        pair_rows=torch.randperm(pairs, generator=generator).numpy(),
        exact_x=exact,
    )
