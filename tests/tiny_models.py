"""Tiny MoE models with random weights: one config per architecture, sizes picked to be small and awkward.

Hidden and intermediate sizes are not powers of two and differ, expert counts are not multiples of 4, some layers are
dense. Weights are large enough that routing spreads over the experts and the logits of two tokens are not nearly equal.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

_SPECIFIC: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "head_dim": 16,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "head_dim": 16,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "deepseek_v2": {
        **_MLA,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_MLA,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "glm4_moe": {
        "head_dim": 16,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        "head_dim": 16,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
    "olmoe": {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3},
    "granitemoe": {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.8,
    },
    "phimoe": {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2},
    "minimax_m2": {"head_dim": 16, "intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 3},
    "ernie4_5_moe": {
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "intermediate_size": 40, "num_experts": 6, "moe_topk": 2},
}

ARCHITECTURES: list[str] = list(_SPECIFIC)
"""The model types that `tiny_config` knows."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config whose model has about 10^5 parameters and MoE layers, and no token that ends the text."""
    return AutoConfig.for_model(model_type, **{**COMMON, **_SPECIFIC[model_type]})


def build_tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of `tiny_config(model_type)` in evaluation mode; the same seed gives the same weights.

    Every parameter and every router's correction bias is random and non-zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                _randomise(name, buffer, generator)
    return model.eval()


def _randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if "correction_bias" in name:
        tensor.copy_(0.05 * noise)
    elif tensor.dim() == 1:
        # Norm scales, biases and recurrence constants stay near what their architecture starts them from.
        tensor.add_(0.1 * noise)
    else:
        tensor.copy_(0.15 * noise)
