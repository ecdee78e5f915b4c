"""Every supported architecture: the checkpoint loads without missing or unexpected keys and computes finite logits."""

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from examples.make_checkpoint import (
    RandomWeights,
    TensorLayout,
    checkpoint_layout,
    main,
    make_config,
    parse_size,
    plan_shards,
    write_checkpoint,
)

SIZES = {"layers": 2, "hidden": 64, "experts": 4, "expert_intermediate": 32, "top_k": 2, "heads": 4, "vocab": 256}
GROUPED = SIZES | {"kv_heads": 2, "head_dim": 16}
ONE_DENSE = {"first_k_dense_replace": 1, "intermediate_size": 48}
LATENT = ONE_DENSE | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

ARCHITECTURES: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "mixtral": (GROUPED, {}, "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    "qwen2_moe": (GROUPED, {"shared_expert_intermediate_size": 48}, "model.layers.1.mlp.experts.3.down_proj.weight"),
    "qwen3_moe": (GROUPED, {}, "model.layers.1.mlp.experts.3.gate_proj.weight"),
    "qwen3_next": (
        GROUPED | {"layers": 4},
        LINEAR | {"shared_expert_intermediate_size": 48},
        "model.layers.3.mlp.experts.3.up_proj.weight",
    ),
    "deepseek_v2": (GROUPED | {"kv_heads": 4}, LATENT, "model.layers.1.mlp.experts.3.down_proj.weight"),
    "deepseek_v3": (GROUPED | {"kv_heads": 4}, LATENT, "model.layers.1.mlp.gate.e_score_correction_bias"),
    "glm4_moe": (GROUPED, ONE_DENSE, "model.layers.1.mlp.shared_experts.down_proj.weight"),
    "gpt_oss": (GROUPED, {}, "model.layers.1.mlp.experts.gate_up_proj_bias"),
    "olmoe": (GROUPED, {}, "model.layers.1.mlp.experts.3.down_proj.weight"),
    "granitemoe": (GROUPED, {}, "model.layers.1.block_sparse_moe.input_linear.weight"),
    "phimoe": (GROUPED, {}, "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    "minimax_m2": (GROUPED, {}, "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
    "ernie4_5_moe": (GROUPED, {"moe_layer_start_index": 1}, "model.layers.1.mlp.experts.3.down_proj.weight"),
    "hunyuan_v1_moe": (GROUPED, {}, "model.layers.1.mlp.shared_mlp.down_proj.weight"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_and_computes(arch: str, tmp_path: Any) -> None:
    sizes, overrides, expected_key = ARCHITECTURES[arch]
    config = make_config(arch, sizes, overrides)
    out = write_checkpoint(config, tmp_path / "model")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert expected_key in file.keys()  # noqa: SIM118 - not a mapping
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.architectures == [type(model).__name__]
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, 256)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_router_bias_stays_in_fp32() -> None:
    sizes, overrides, key = ARCHITECTURES["deepseek_v3"]
    layout = {t.name: t for t in checkpoint_layout(make_config("deepseek_v3", sizes, overrides), torch.bfloat16)}
    assert layout[key].dtype == torch.float32
    assert layout["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_tied_embeddings_are_written_once() -> None:
    config = make_config("qwen3_moe", GROUPED, {"tie_word_embeddings": True})
    assert "lm_head.weight" not in {tensor.name for tensor in checkpoint_layout(config, torch.bfloat16)}


def test_values_do_not_depend_on_the_shards(tmp_path: Any) -> None:
    config = make_config("qwen3_moe", GROUPED, {})
    whole = write_checkpoint(config, tmp_path / "whole", seed=3)
    parts = write_checkpoint(config, tmp_path / "parts", seed=3, shard_bytes=20_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in parts.glob("*.safetensors")}
    with safe_open(whole / "model.safetensors", "pt") as one:
        assert set(one.keys()) == set(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(one.get_tensor(name).nbytes for name in one.keys())  # noqa: SIM118
        for name, file_name in index["weight_map"].items():
            with safe_open(parts / file_name, "pt") as part:
                assert torch.equal(one.get_tensor(name), part.get_tensor(name))
    model = AutoModelForCausalLM.from_pretrained(parts)
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_normal_and_distinct(dtype: torch.dtype) -> None:
    weights = RandomWeights(0, 0.02)
    # One more than a chunk: the last chunk holds a single number.
    shape = (2**21 + 1,)
    tensors = [
        torch.frombuffer(bytearray(b"".join(weights.chunks(TensorLayout(name, shape, dtype)))), dtype=dtype).float()
        for name in ("a", "b", "a")
    ]
    assert torch.equal(tensors[0], tensors[2])
    correlation = torch.corrcoef(torch.stack(tensors[:2]))[0, 1]
    assert abs(correlation) < 5e-3
    assert abs(tensors[0].mean()) < 1e-4
    assert tensors[0].std() == pytest.approx(0.02, rel=1e-2)


def test_another_seed_gives_other_values() -> None:
    layout = TensorLayout("a", (64,), torch.float32)
    first, second = (b"".join(RandomWeights(seed, 0.02).chunks(layout)) for seed in (0, 1))
    assert first != second


def test_a_shard_exceeds_its_size_only_for_one_tensor() -> None:
    layout = [TensorLayout(str(i), (count,), torch.float32) for i, count in enumerate([10, 10, 50, 1])]
    shards = plan_shards(layout, shard_bytes=80)
    assert [[tensor.numbers for tensor in shard] for shard in shards.values()] == [[10, 10], [50], [1]]
    assert next(iter(shards)) == "model-00001-of-00003.safetensors"


def test_an_existing_directory_is_left_alone(tmp_path: Any) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        write_checkpoint(make_config("qwen3_moe", GROUPED, {}), tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="GB free"):
        write_checkpoint(make_config("qwen3_moe", GROUPED, {}), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path: Any) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(make_config("qwen3_moe", GROUPED, {}), tmp_path / "model", progress=stop)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="num_expert_groups"):
        make_config("qwen3_moe", GROUPED, {"num_expert_groups": 2})
    with pytest.raises(ValueError, match="no architecture"):
        make_config("qwen9_moe", GROUPED, {})
    with pytest.raises(ValueError, match="dense feed-forward"):
        make_config("mixtral", {"dense_intermediate": 64}, {})


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1.5mb", 1_500_000), ("100B", 100), ("4096", 4096)])
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_command_line(tmp_path: Any) -> None:
    arguments = "--layers 1 --hidden 64 --experts 4 --expert-intermediate 32 --top-k 2 --heads 4 --kv-heads 2"
    arguments += (
        ' --head-dim 16 --vocab 128 --dtype float32 --set rope_parameters={"rope_theta":5e5,"rope_type":"default"}'
    )
    result = CliRunner().invoke(main, [str(tmp_path / "model"), *arguments.split()])
    assert result.exit_code == 0, result.output
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.dtype == torch.float32
    again = CliRunner().invoke(main, [str(tmp_path / "model"), *arguments.split()])
    assert again.exit_code == 1
    assert "exists already" in again.output
