"""Tiny checkpoints in the layouts of quantised models on the Hub, with random codes and scales, and their weights.

What the codes mean is written down here a second time, weight by weight as the formats define it, without a line of
the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.tiny_models import tiny_config

_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

Tensors = dict[str, torch.Tensor]


def config_of(model_type: str, **sizes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(**{**tiny_config(model_type).to_dict(), **sizes})


def unquantised(config: PretrainedConfig, seed: int = 0) -> Tensors:
    """The tensors of a random bf16 model, in the keys of the Hub."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.dim() == 1 else parameter.copy_(0.15 * noise)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def write(directory: Path, config: PretrainedConfig, tensors: Tensors, quantisation: dict[str, Any] | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fields = config.to_dict() | {"architectures": [architecture(config)]} | {"dtype": "bfloat16"}
    if quantisation is not None:
        fields["quantization_config"] = quantisation
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def architecture(config: PretrainedConfig) -> str:
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config)).__name__


MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def mxfp4_tensors(originals: Tensors, seed: int = 0) -> Tensors:
    """gpt-oss as OpenAI has it: experts as blocks and scales, everything else bf16."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for key, tensor in originals.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            shape = (count, rows, columns // 32)
            tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[key] = tensor
    return tensors


def mxfp4_weights(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., N, K] in float64 of blocks [..., N, G, 16] and scales [..., N, G]."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float64)
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
    return (pairs * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2)


def fp8_config(block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }


def fp8_tensors(
    originals: Tensors,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """Linear layers and experts as e4m3 codes of any magnitude, with scales that no search would choose."""
    generator = torch.Generator().manual_seed(seed + 2)
    tensors = {}
    for key, tensor in originals.items():
        kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "correction_bias")
        if tensor.dim() != 2 or any(word in key for word in kept):
            tensors[key] = tensor
            continue
        tensors[key], tensors[f"{key}_scale_inv"] = random_fp8(*tensor.shape, block, scale_dtype, generator)
    return tensors


def random_fp8(
    rows: int, columns: int, block: tuple[int, int], scale_dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (0.3 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = 0.3 + 0.4 * torch.rand(grid, generator=generator)
    return codes, scales.to(scale_dtype)


def fp8_weights(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[N, K] in fp32, one block at a time."""
    weights = codes.float()
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            rows = slice(down * block[0], (down + 1) * block[0])
            columns = slice(across * block[1], (across + 1) * block[1])
            weights[rows, columns] *= scales[down, across].float()
    return weights


def decoded(tensors: Tensors, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The same checkpoint without quantisation."""
    plain = {}
    for key, tensor in tensors.items():
        if key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            plain[name] = mxfp4_weights(tensor, tensors[f"{name}_scales"]).mT.to(dtype)
        elif tensor.dtype is torch.float8_e4m3fn:
            plain[key] = fp8_weights(tensor, tensors[f"{key}_scale_inv"], block).to(dtype)
        elif not key.endswith(("_scales", "_scale_inv")):
            plain[key] = tensor.to(dtype)
    return plain
