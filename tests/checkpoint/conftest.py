"""Tiny models on disk, each written once per run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.tiny_models import build_tiny


@dataclass(frozen=True)
class Saved:
    """A model in memory and the directory that it was written to."""

    model: PreTrainedModel
    directory: Path

    def skeleton(self) -> PreTrainedModel:
        return meta_skeleton(copy.deepcopy(self.model.config))


def meta_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


SaveTiny = Callable[..., Saved]


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> SaveTiny:
    """`save_tiny(model_type, sharded=..., original=...)`; tests must not change what it wrote."""
    known: dict[tuple[object, ...], Saved] = {}

    def save(
        model_type: str, *, sharded: bool = False, original: bool = True, dtype: torch.dtype = torch.bfloat16
    ) -> Saved:
        key = (model_type, sharded, original, dtype)
        if key not in known:
            directory = tmp_path_factory.mktemp(model_type)
            model = build_tiny(model_type, dtype)
            model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB", save_original_format=original)
            known[key] = Saved(model, directory)
        return known[key]

    return save
