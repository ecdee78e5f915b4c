"""The peak that the plan states is held, measured in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig

import offload
from examples.make_checkpoint import write_checkpoint
from tests.conftest import TinyCheckpoint
from tests.quantised_checkpoints import MXFP4_CONFIG, Tensors, fp8_config, fp8_tensors, mxfp4_tensors, write

REPOSITORY = Path(__file__).parent.parent

SHAPES: dict[str, dict[str, int]] = {
    "qwen3_moe": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 8000,
    },
    "gpt_oss": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 8000,
    },
}


def quantise(config: PretrainedConfig, directory: Path) -> None:
    """In place: gpt-oss to MXFP4, others to fp8."""
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    shutil.rmtree(directory)
    if config.model_type == "gpt_oss":
        write(directory, config, mxfp4_tensors(tensors), MXFP4_CONFIG)
    else:
        write(directory, config, fp8_tensors(tensors), fp8_config())


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "quantised"])
@pytest.mark.parametrize(("model_type", "context", "prompt_tokens"), [("qwen3_moe", 40, 32), ("gpt_oss", 320, 300)])
def test_peak_memory_is_what_the_plan_says(
    model_type: str, context: int, prompt_tokens: int, quantised: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    config = AutoConfig.for_model(model_type, **SHAPES[model_type])
    write_checkpoint(config, directory, dtype=torch.bfloat16)
    if quantised:
        quantise(config, directory)
    checkpoint_nbytes = sum(file.stat().st_size for file in directory.iterdir())
    everything = offload.plan(directory, ram="8GiB", context=context)
    budget = everything.peak_ram_nbytes - everything.ram.slot_nbytes + everything.expert_nbytes // 16
    assert quantised or checkpoint_nbytes >= 4 * budget or model_type != "qwen3_moe"
    arguments = (directory, tmp_path / "stores", budget, context, prompt_tokens)
    # Of the same family: what its kernels take to be compiled is not the model's.
    warm_up = tiny_checkpoint(model_type, torch.bfloat16)
    # The first run converts, the second finds the store.
    for _ in range(2):
        found = subprocess.run(
            [sys.executable, "-m", "tests.peak_memory", *map(str, arguments), str(warm_up)],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        measured = json.loads(found.stdout.splitlines()[-1])
        assert measured["plan_peak_nbytes"] <= budget
        assert measured["peak_nbytes"] <= measured["plan_peak_nbytes"]
