"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU the kernels' tests are tests of the GPU: `pytest -m gpu` runs them, compiled."""
    if torch.cuda.is_available():
        for item in items:
            if "gpu_kernels" in item.path.parts:
                item.add_marker(pytest.mark.gpu)
