from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import offload
from offload.store import files
from placement.datasheets import datasheet
from placement.plan import Plan
from tests.cli.conftest import Invoke
from tests.tiny_models import build_tiny


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_json_is_the_plan_and_nothing_else(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    nvme = tmp_path / "not" / "yet"
    result = invoke("plan", checkpoint, "--ram", "100MiB", "--nvme", nvme, "--context", 200, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert Plan.from_json(result.stdout) == offload.plan(str(checkpoint), ram="100MiB", context=200)
    assert not (tmp_path / "not").exists()


def test_the_table_has_every_figure(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("plan", checkpoint, "--ram", "100MiB", "--nvme", tmp_path / "store")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = offload.plan(checkpoint, ram="100MiB")
    text = flat(result.stdout)
    for nbytes in (plan.ram.dense_nbytes, plan.ram.kv_nbytes, plan.ram.activation_nbytes, plan.ram.slot_nbytes):
        assert offload.sizes.format_size(nbytes) in text
    assert f"peak ram {offload.sizes.format_size(plan.peak_ram_nbytes)}" in text
    assert "budget 100.00 MiB minimum" in text
    assert f"--ram {plan.minimum_ram_nbytes}" in text
    assert "experts in RAM 24 of 24 (100%)" in text
    assert f"KV cache {offload.sizes.format_size(plan.kv_nbytes_per_token)} per token" in text
    assert f"disk needed {offload.sizes.format_size(plan.disk_nbytes)}" in text
    assert "store none yet" in text
    footprint = re.search(r"interpreter and libraries, about ([\d.]+) (MiB|GiB)", text)
    assert footprint
    assert float(footprint[1]) * (1024 if footprint[2] == "GiB" else 1) > 100
    assert not (tmp_path / "store").exists()


def test_speed_after_the_whole_context_is_told(
    invoke: Invoke, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = datasheet(cpu="ddr5-desktop", drive="gen4")
    monkeypatch.setattr("offload.preparation.cached_profile", lambda root: profile)
    options = ("--ram", "100MiB", "--context", 512)
    short, whole = (
        json.loads(invoke("plan", checkpoint, *options, "--prompt", prompt, "--json").stdout)["prediction"]["decode"]
        for prompt in (8, 512)
    )
    speeds = [one["tokens"] / sum(one["terms"].values()) for one in (short, whole)]
    text = flat(invoke("plan", checkpoint, *options, "--prompt", 8).stdout)
    assert f"expected decode {speeds[0]:.2f} tokens/s" in text
    assert f"after 512 tokens decode {speeds[1]:.2f} tokens/s" in text
    assert speeds[1] < speeds[0]


def test_where_a_long_context_spills_is_told(invoke: Invoke, checkpoint: Path) -> None:
    # Positions beyond what the model was made for are not the plan's business.
    options = ("--ram", "1GiB", "--context", 131072, "--kv", "int8", "--kv-ram", "8MiB")
    plan = Plan.from_json(invoke("plan", checkpoint, *options, "--json").stdout)
    assert plan.kv is not None and plan.kv.spills_at_tokens is not None
    assert 0 < plan.kv.spills_at_tokens < 131072
    text = flat(invoke("plan", checkpoint, *options).stdout)
    size = offload.sizes.format_size
    assert f"KV cache {size(plan.kv.nbytes_per_token)} per token in int8 blocks" in text
    spilled = f"beyond {plan.kv.spills_at_tokens} tokens on disk, {size(plan.kv.disk_nbytes)} at the full context"
    assert spilled in text


def test_the_prompt_chunk_is_planned(invoke: Invoke, checkpoint: Path) -> None:
    result = invoke("plan", checkpoint, "--ram", "100MiB", "--prefill-chunk", 64, "--json")
    assert Plan.from_json(result.stdout) == offload.plan(checkpoint, ram="100MiB", prefill_chunk=64)
    for wrong in ("0", "-1", "some"):
        refused = invoke("plan", checkpoint, "--prefill-chunk", wrong)
        assert (refused.exit_code, refused.stdout) == (2, ""), wrong
        assert "nor auto" in flat(refused.stderr)
    elsewhere = invoke("plan", checkpoint, "--gpu", "rtx4090", "--prefill-chunk", "auto")
    assert elsewhere.exit_code == 2
    assert "a plan for this machine" in flat(elsewhere.stderr)


def test_without_ram_it_says_what_it_took(invoke: Invoke, checkpoint: Path) -> None:
    assert "nine tenths of what is available" in flat(invoke("plan", checkpoint).stdout)


def test_a_store_that_is_there_is_named(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    with offload.load(checkpoint, ram="100MiB", nvme=tmp_path / "store", progress=False).offload as runtime:
        key = runtime.store.path.name
    assert f"store there: {key}" in flat(invoke("plan", checkpoint, "--nvme", tmp_path / "store").stdout)
    (tmp_path / "store" / key / "manifest.json").write_text("{}")
    result = invoke("plan", checkpoint, "--nvme", tmp_path / "store")
    assert "store damaged:" in flat(result.stdout)


def test_does_not_fit(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    least = offload.plan(checkpoint, ram="1GiB").minimum_ram_nbytes
    arguments = ["plan", checkpoint, "--nvme", tmp_path / "store", "--ram"]
    result = invoke(*arguments, least - 1)
    assert (result.exit_code, result.stdout) == (3, "")
    assert str(least) in result.stderr
    result = invoke(*arguments, least - 1, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["minimum_ram_bytes"]) == ("DoesNotFitError", least)
    assert invoke(*arguments, least).exit_code == 0
    assert not (tmp_path / "store").exists()


def test_does_not_fit_the_disk(
    invoke: Invoke, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_nbytes", lambda _directory: 1000)
    arguments = ["plan", checkpoint, "--ram", "100MiB", "--nvme", tmp_path / "store"]
    result = invoke(*arguments)
    assert result.exit_code == 3
    assert "peak" in result.stdout
    assert "--nvme" in result.stderr
    result = invoke(*arguments, "--json")
    assert result.exit_code == 3
    plan = offload.plan(checkpoint, ram="100MiB")
    assert json.loads(result.stdout)["error"]["minimum_disk_bytes"] == plan.disk_nbytes


def test_another_dtype(invoke: Invoke, checkpoint: Path) -> None:
    result = invoke("plan", checkpoint, "--ram", "100MiB", "--dtype", "bfloat16", "--json")
    assert json.loads(result.stdout)["format"] == "bf16"


def test_a_hub_id_is_not_downloaded(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", "nobody/no-such-model-of-nobody")
    assert result.exit_code == 4
    assert "`offload plan` downloads nothing" in result.stderr


def test_a_corrupt_checkpoint(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    result = invoke("plan", model, "--json")
    assert result.exit_code == 4
    error = json.loads(result.stdout)["error"]
    assert "model.safetensors" in error["message"]
    assert error["minimum_ram_bytes"] is None


def test_a_name_with_brackets(invoke: Invoke, tmp_path: Path) -> None:
    build_tiny("mixtral").save_pretrained(tmp_path / "[bold] [/x]")
    result = invoke("plan", tmp_path / "[bold] [/x]", "--ram", "100MiB", "--nvme", tmp_path / "[store]")
    assert result.exit_code == 0, result.stderr
    assert "[bold] [/x]: mixtral" in result.stdout
    assert "[store]" in result.stdout
