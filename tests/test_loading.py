"""The door of the package: arguments, budgets, the three kinds of first argument."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import offload
from offload.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DoesNotFitError,
    InvalidArgumentError,
    UnsupportedModelError,
)
from offload.store.catalog import list_stores
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.tiny_models import build_tiny


@pytest.fixture
def directory(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("qwen3_moe")


def test_the_stated_minimum_is_exact(directory: Path, store_root: Path) -> None:
    with pytest.raises(DoesNotFitError, match="ram=") as caught:
        offload.load(directory, ram=1, nvme=store_root, context=64)
    minimum = caught.value.minimum_ram_bytes
    with pytest.raises(DoesNotFitError) as one_less:
        offload.load(directory, ram=minimum - 1, nvme=store_root, context=64)
    assert one_less.value.minimum_ram_bytes == minimum
    model = offload.load(directory, ram=minimum, nvme=store_root, context=64)
    assert model.offload.plan.peak_ram_nbytes <= minimum
    greedy(model, prompt())
    model.offload.close()


def test_what_does_not_fit_is_refused_before_anything_is_read_or_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_args: object, **_options: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("offload.checkpoint.checkpoint.Checkpoint.read", read)
    monkeypatch.setattr("offload.checkpoint.checkpoint.Checkpoint.read_into", read)
    with pytest.raises(DoesNotFitError):
        offload.load(directory, ram="1MiB", nvme=tmp_path / "stores")
    assert not (tmp_path / "stores").exists()


def test_plan_is_what_load_executes(directory: Path, store_root: Path) -> None:
    plan = offload.plan(directory, ram="40MiB", context=64)
    model = offload.load(directory, ram="40MiB", nvme=store_root, context=64)
    assert model.offload.plan == plan
    assert type(plan).from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["ram_slots"] == plan.ram_slots
    model.offload.close()


def test_max_memory_is_another_spelling_of_ram(directory: Path) -> None:
    assert offload.plan(directory, max_memory={"cpu": "1GiB"}) == offload.plan(directory, ram="1GiB")


@pytest.mark.parametrize(
    "arguments",
    [
        {"ram": "4Gb"},
        {"ram": "-1GiB"},
        {"ram": True},
        {"ram": "1GiB", "context": 0},
        {"ram": "1GiB", "context": 1.5},
        {"ram": "1GiB", "batch": -1},
        {"ram": "1GiB", "prefill_chunk": 0},
        {"ram": "1GiB", "dtype": "int8"},
        {"ram": "1GiB", "max_memory": {"cpu": "1GiB"}},
        {"max_memory": {0: "1GiB", "cpu": "1GiB"}},
        {"ram": "1GiB", "checkpoint": "elsewhere"},
        {"ram": "1GiB", "nvme": ""},
    ],
)
def test_bad_arguments_are_named(directory: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        offload.load(directory, **arguments)  # type: ignore[arg-type]
    assert any(name in str(caught.value) for name in arguments)


def test_an_unknown_argument_is_refused(directory: Path) -> None:
    with pytest.raises(TypeError, match="vvram"):
        offload.load(directory, vvram="1GiB")  # type: ignore[call-arg]


def test_a_file_as_store_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(InvalidArgumentError):
        offload.load(directory, ram="1GiB", nvme=tmp_path / "file", context=64)


def test_the_first_argument_must_be_a_model() -> None:
    with pytest.raises(InvalidArgumentError, match="expected a directory, a Hub id or a transformers model"):
        offload.load(17, ram="1GiB")  # type: ignore[arg-type]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        offload.load(tmp_path / "nowhere", ram="1GiB")


def test_an_unknown_architecture_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "no_such_moe"}))
    with pytest.raises(UnsupportedModelError, match="no_such_moe"):
        offload.load(tmp_path / "model", ram="1GiB")


def test_a_config_that_is_no_json_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        offload.load(tmp_path / "model", ram="1GiB")


def test_missing_dense_weights_are_named(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        offload.load(tmp_path / "model", ram="1GiB", nvme=tmp_path / "stores", context=64)


def test_a_second_load_finds_the_store(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt()
    first = offload.load(directory, ram="1GiB", nvme=tmp_path, context=64)
    expected = greedy(first, ids)
    first.offload.close()
    (store,) = list_stores(tmp_path)
    assert store.status == "complete"

    def convert(*_args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("offload.checkpoint.bundles.CheckpointBundleSource.fill_bundle", convert)
    second = offload.load(directory, ram="1GiB", nvme=tmp_path, context=64)
    assert torch.equal(greedy(second, ids), expected)
    second.offload.close()


def test_a_changed_checkpoint_gets_a_store_of_its_own(tmp_path: Path) -> None:
    ids = prompt()
    for seed in (0, 1):
        build_tiny("qwen3_moe", seed=seed).save_pretrained(tmp_path / "model")
        model = offload.load(tmp_path / "model", ram="1GiB", nvme=tmp_path / "stores", context=64)
        assert torch.equal(greedy(model, ids), greedy(reference_model(tmp_path / "model", torch.float32), ids))
        model.offload.close()
    assert len(list_stores(tmp_path / "stores")) == 2


def test_a_model_in_memory_is_wrapped_and_loses_its_experts(directory: Path, store_root: Path) -> None:
    ids = prompt()
    reference = reference_model(directory, torch.float32)
    expected, expected_logits = greedy(reference, ids), logits(reference, ids)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = sum(p.numel() for p in model.parameters())
    wrapped = offload.load(model, ram="1GiB", nvme=store_root, context=64)
    assert wrapped is model
    experts = model.config.num_experts * len(model.offload.layers)
    per_expert = 3 * model.config.hidden_size * model.config.moe_intermediate_size
    assert before - sum(p.numel() for p in model.parameters()) == experts * per_expert
    assert torch.equal(greedy(wrapped, ids), expected)
    assert (logits(wrapped, ids) - expected_logits).abs().max() < 1e-4
    model.offload.close()


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "deepseek_v3"])
def test_every_layout_of_a_model_in_memory(model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    ids = prompt()
    directory = tiny_checkpoint(model_type)
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = offload.load(reference_model(directory, torch.float32), ram="1GiB", nvme=store_root, context=64)
    assert torch.equal(greedy(model, ids), expected)
    model.offload.close()


def test_a_model_on_meta_is_filled_from_its_checkpoint(directory: Path, store_root: Path) -> None:
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = offload.load(skeleton, checkpoint=directory, ram="1GiB", nvme=store_root, context=64)
    assert model is skeleton
    ids = prompt()
    assert torch.equal(greedy(model, ids), greedy(reference_model(directory, torch.float32), ids))
    model.offload.close()


def test_a_model_on_meta_without_its_checkpoint_is_refused(directory: Path) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    with pytest.raises(InvalidArgumentError, match="checkpoint="):
        offload.load(skeleton, ram="1GiB")


def test_a_failed_wrap_leaves_the_model_as_it_was(directory: Path, store_root: Path) -> None:
    ids = prompt()
    model = reference_model(directory, torch.float32)
    expected = greedy(model, ids)
    with pytest.raises(DoesNotFitError):
        offload.load(model, ram="1MiB", nvme=store_root)
    assert torch.equal(greedy(model, ids), expected)


def test_import_is_light() -> None:
    code = "import offload, sys; print([m for m in ('torch', 'numba', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_config_shared_with_another_model_stays_as_it_was(store_root: Path) -> None:
    wrapped = build_tiny("mixtral")
    other = AutoModelForCausalLM.from_config(wrapped.config).eval()
    before = wrapped.config.to_dict(), wrapped.config._experts_implementation
    loaded = offload.load(wrapped, ram="1GiB", nvme=store_root, context=64)
    assert (wrapped.config.to_dict(), wrapped.config._experts_implementation) == before
    assert torch.isfinite(logits(other, prompt())).all()
    loaded.offload.close()


def test_the_plan_states_the_disk_that_the_store_takes(directory: Path, tmp_path: Path) -> None:
    plan = offload.plan(directory, ram="1GiB", context=64)
    offload.load(directory, ram="1GiB", nvme=tmp_path, context=64).offload.close()
    (store,) = list_stores(tmp_path)
    taken = sum(file.stat().st_blocks * 512 for file in store.path.iterdir())
    assert taken <= plan.disk_nbytes <= taken + (4 << 20)


def test_progress_adds_up(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[list[object]] = []

    class Recorder:
        def start(self, total_bytes: int, description: str) -> None:
            tasks.append([description, total_bytes, 0, False])

        def advance(self, nbytes: int) -> None:
            tasks[-1][2] += nbytes  # type: ignore[operator]

        def finish(self) -> None:
            tasks[-1][3] = True

    monkeypatch.setattr("offload.loading.progress_bar", lambda _show: Recorder())
    for words in (["converting", "kernels", "experts"], ["dense", "kernels", "experts"]):
        tasks.clear()
        offload.load(directory, ram="1GiB", nvme=tmp_path, context=64).offload.close()
        assert [word in str(task[0]) for word, task in zip(words, tasks, strict=True)] == [True] * 3
        assert all(done == total and finished for _, total, done, finished in tasks)
