"""Tiny dense models with random weights, of many narrow layers: as large models, they have little outside of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.tiny_models import COMMON

LAYERS = 32

_COMMON: dict[str, Any] = {**COMMON, "intermediate_size": 72, "num_hidden_layers": LAYERS}

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 48, "max_position_embeddings": 64},
    "gpt2": {"n_inner": 72, "max_position_embeddings": 48},
}

DENSE_FAMILIES: list[str] = list(_SPECIFIC)
"""The model types that `dense_config` knows."""


def dense_config(model_type: str, **changed: Any) -> PretrainedConfig:
    """A config of LAYERS layers, and no token that ends the text."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **_SPECIFIC[model_type], **changed})


def write_dense(
    directory: Path, model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changed: Any
) -> Path:
    """Let transformers write a model of `dense_config`, every parameter random and non-zero; the directory.

    Matrices are of a size with which the residual stream neither vanishes nor grows beyond bounds in so many layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(dense_config(model_type, **changed), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    model.save_pretrained(directory)
    return directory
