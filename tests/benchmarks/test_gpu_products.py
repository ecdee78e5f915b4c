"""Shapes and bounds of what experts are timed beside."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu_products import ExpertProducts, torch_seconds

PRODUCTS = ExpertProducts(hidden=64, intermediate=32, tokens_of=(3, 0, 5))


def test_operations_and_bound() -> None:
    assert PRODUCTS.flops == 8 * 2 * (64 * 64 + 32 * 64)
    assert PRODUCTS.memory_bound_s(1000, 1e6) == pytest.approx(2e-3), "an expert without tokens is not read"


def test_products_have_the_experts_shapes() -> None:
    shapes = []
    multiply = torch.mm

    def seen(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(left.shape), tuple(right.shape)))
        return multiply(left, right)

    with patch.object(torch, "mm", seen):
        found = torch_seconds(PRODUCTS, torch.device("cpu"), 1)
    assert set(shapes) == {
        ((8, 64), (64, 96)), ((3, 64), (64, 64)), ((3, 32), (32, 64)), ((5, 64), (64, 64)), ((5, 32), (32, 64)),
    }  # fmt: skip
    assert min(found.one_product, found.by_expert, found.by_expert_from_python) > 0
    assert (found.grouped is None) == bool(found.why_not_grouped)


def test_torch_without_grouped_products_is_said() -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("only on compute capability 9.0\nand more")

    with patch.object(torch, "_grouped_mm", refused):
        found = torch_seconds(PRODUCTS, torch.device("cpu"), 1)
    assert (found.grouped, found.why_not_grouped) == (None, "only on compute capability 9.0")
