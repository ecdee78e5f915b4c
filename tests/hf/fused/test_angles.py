"""Angles made ahead have the bits of those that the model's module gives for each position."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from offload.hf.fused.angles import AHEAD_POSITIONS, Angles
from tests.tiny_models import tiny_config

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 2.0},
}  # fmt: skip


def rotary(kind: str) -> torch.nn.Module:
    config = tiny_config("mixtral")
    config.head_dim = 32
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, **KINDS[kind]}
    module = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
    assert isinstance(module, torch.nn.Module)
    return module


def calls_of(module: torch.nn.Module) -> list[int]:
    """How many positions each call was for, from now on."""
    counts: list[int] = []
    module.register_forward_pre_hook(
        lambda _module, _args, kwargs: counts.append(kwargs["position_ids"].shape[1]), with_kwargs=True
    )
    return counts


def as_tensors(rows: npt.NDArray[np.integer], dtype: torch.dtype) -> list[torch.Tensor]:
    """Cosines and sines [1, 1, angles] of what `Angles.at` gives."""
    return [torch.from_numpy(row)[None].view(dtype) for row in rows]


def alone(module: torch.nn.Module, position: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = module(torch.zeros(1, 1, 8, dtype=dtype), position_ids=torch.tensor([[position]]))
    return cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_have_the_bits_of_each_position_alone(kind: str, dtype: torch.dtype) -> None:
    module, other = rotary(kind), rotary(kind)
    angles = Angles(module, dtype)
    for position in (0, 1, 5, 63, 64, 65, 40, 127, 128, 300, 5000, 131_071, 2):
        for found, expected in zip(as_tensors(angles.at(position), dtype), alone(other, position, dtype), strict=True):
            assert found.shape == expected.shape and found.dtype is expected.dtype
            assert torch.equal(found, expected)


def test_are_made_for_many_positions_at_once() -> None:
    module = rotary("default")
    angles = Angles(module, torch.float32)
    counts = calls_of(module)
    for position in range(7, 7 + 2 * AHEAD_POSITIONS):
        angles.at(position)
    assert counts == [AHEAD_POSITIONS, AHEAD_POSITIONS]


def test_frequencies_that_follow_the_length_are_asked_for_each_position() -> None:
    module = rotary("dynamic")
    angles = Angles(module, torch.float32)
    counts = calls_of(module)
    for position in range(3):
        angles.at(position)
    assert counts == [1, 1, 1]


@pytest.mark.parametrize("change", ["in place", "scale"])
def test_what_a_user_changes_is_heeded(change: str) -> None:
    module = rotary("default")
    angles = Angles(module, torch.float32)
    angles.at(9)
    if change == "in place":
        module.get_buffer("inv_freq").mul_(0.5)
    else:
        module.attention_scaling = 2.0  # type: ignore[assignment]
    assert all(map(torch.equal, as_tensors(angles.at(10), torch.float32), alone(module, 10, torch.float32)))


def test_made_in_inference_mode_they_serve_outside_of_it() -> None:
    module = rotary("default")
    angles = Angles(module, torch.float32)
    with torch.inference_mode():
        angles.at(4)
    cos, _ = as_tensors(angles.at(5), torch.float32)
    assert torch.equal(cos, alone(module, 5, torch.float32)[0])
