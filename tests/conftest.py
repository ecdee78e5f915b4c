"""What all tests share: tiny checkpoints on disk, and settings that make runs repeatable and quick."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Threads that spin after a parallel region would take the cores of the other test processes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton asks for this when it is imported, which other libraries do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tests.tiny_models import build_tiny

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(model_type, dtype)` → directory, written by transformers; tests must not change it."""
    known: dict[tuple[str, torch.dtype], Path] = {}

    def write(model_type: str, dtype: torch.dtype = torch.float32) -> Path:
        if (model_type, dtype) not in known:
            directory = tmp_path_factory.mktemp(model_type)
            model: PreTrainedModel = build_tiny(model_type, dtype)
            model.save_pretrained(directory)
            known[model_type, dtype] = directory
        return known[model_type, dtype]

    return write


@pytest.fixture(scope="session")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of expert stores for all tests that do not look into it."""
    return tmp_path_factory.mktemp("stores")
