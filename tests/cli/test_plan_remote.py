"""`offload plan --remote` against a Hub of this machine: the plan of a copy that is here, and nothing downloaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from offload import preparation
from offload.checkpoint.index import INDEX_FILE, SINGLE_FILE
from offload.checkpoint.remote import remote_checkpoint
from offload.errors import CheckpointError, CheckpointNotFoundError, HubUnreachableError, UnsupportedModelError
from placement.datasheets import datasheet
from placement.plan import Plan
from tests.cli.conftest import Invoke, character_tokenizer
from tests.cli.hub_server import COMMIT, Hub, running
from tests.quantised_checkpoints import (
    MXFP4_CONFIG,
    config_of,
    fp8_config,
    fp8_tensors,
    mxfp4_tensors,
    unquantised,
    write,
)
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in shards of some ten kB, each larger than its header, and a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny("qwen3_moe").to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
    character_tokenizer().save_pretrained(directory)
    assert (directory / INDEX_FILE).exists()
    return directory


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(Hub({"owner/tiny": checkpoint}, {"owner/gated"})) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        # The client reads this when it is imported, which other tests have done.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        yield found


def test_the_plan_is_that_of_a_copy(hub: Hub, checkpoint: Path, invoke: Invoke) -> None:
    budgets = ("--ram", "64MiB", "--context", "64", "--json")
    result = invoke("plan", "owner/tiny", "--remote", *budgets)
    assert (result.exit_code, result.stderr) == (0, "")
    remote = Plan.from_json(result.stdout)
    local = Plan.from_json(invoke("plan", checkpoint, *budgets).stdout)
    assert replace(remote, model="") == replace(local, model="")


@pytest.mark.parametrize("quant", [(), ("--quant", "fp8_e4m3"), ("--quant", "experts=mxfp4")])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_quantised_checkpoints_are_planned_as_copies_of_them(
    kind: str, quant: tuple[str, ...], hub: Hub, tmp_path: Path, invoke: Invoke
) -> None:
    if kind == "mxfp4":
        config = config_of("gpt_oss", hidden_size=96, intermediate_size=160)
        directory = write(tmp_path / kind, config, mxfp4_tensors(unquantised(config)), MXFP4_CONFIG)
    else:
        config = config_of("mixtral", hidden_size=152, intermediate_size=168)
        tensors = fp8_tensors(load_file(saved(config, tmp_path / "plain")))
        directory = write(tmp_path / kind, config, tensors, fp8_config())
    hub.repositories["owner/quantised"] = directory
    budgets = ("--ram", "64MiB", "--context", "64", "--json", *quant)
    result = invoke("plan", "owner/quantised", "--remote", *budgets)
    assert (result.exit_code, result.stderr) == (0, "")
    local = Plan.from_json(invoke("plan", directory, *budgets).stdout)
    assert replace(Plan.from_json(result.stdout), model="") == replace(local, model="")


def test_formats_that_are_left_open_are_weighed_as_of_a_copy(
    hub: Hub, checkpoint: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the profile is read once for them all."""
    read = []
    monkeypatch.setattr(preparation, "cached_profile", lambda root: read.append(root) or datasheet(cpu="ddr5-desktop"))
    budgets = ("--ram", "64MiB", "--context", "64", "--quant", "auto", "--json")
    remote = Plan.from_json(invoke("plan", "owner/tiny", "--remote", *budgets).stdout)
    assert len(read) == 1
    local = Plan.from_json(invoke("plan", checkpoint, *budgets).stdout)
    assert len(read) == 2
    assert len(remote.format_options) == 3
    assert replace(remote, model="") == replace(local, model="")


def saved(config: PretrainedConfig, directory: Path) -> Path:
    """The file of a random model in the keys of the Hub."""
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory / SINGLE_FILE


def test_headers_are_all_that_is_read(hub: Hub, checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("plan", "owner/tiny", "--remote", "--ram", "64MiB", "--context", "64", "--quant", "int4")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "after a download of" in result.stdout
    shards = {name for name in hub.served if name.endswith(".safetensors")}
    assert len(shards) == len(list(checkpoint.glob("*.safetensors"))) > 3
    assert set(hub.served) - shards == {"owner/tiny/config.json", f"owner/tiny/{INDEX_FILE}"}


def test_only_the_first_bytes_of_a_large_file_are_asked_for(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "single"
    directory.mkdir()
    shutil.copy(checkpoint / "config.json", directory)
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_file(shard)
    tensors["unused.weight"] = torch.zeros(1 << 19)
    save_file(tensors, directory / SINGLE_FILE)
    hub.repositories["owner/single"] = directory
    with remote_checkpoint("owner/single") as found:
        assert found.commit == COMMIT
        assert {name: span.shape for name, span in found.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        scratch = found.directory
    assert not scratch.exists(), "nothing is kept"
    assert hub.served[f"owner/single/{SINGLE_FILE}"] <= 100_001 < (directory / SINGLE_FILE).stat().st_size


def test_machines_that_are_not_here(hub: Hub, invoke: Invoke) -> None:
    result = invoke("plan", "owner/tiny", "--remote", "--cpu", "ddr5-desktop", "--drive", "gen4", "--context", "64")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "datasheet" in result.stdout


@pytest.mark.parametrize(
    ("repository", "arguments", "kind", "code", "said"),
    [
        ("owner/private", (), CheckpointNotFoundError, 4, "if it is private, set HF_TOKEN"),
        ("owner/gated", (), CheckpointNotFoundError, 4, "accept its terms"),
        ("owner/tiny", ("--revision", "v9"), CheckpointNotFoundError, 4, "no such revision"),
        ("not an id", (), CheckpointNotFoundError, 4, "owner/name"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_may_not_be_read(
    hub: Hub, invoke: Invoke, repository: str, arguments: tuple[str, ...], kind: type, code: int, said: str
) -> None:
    result = invoke("plan", repository, "--remote", "--json", *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == kind.__name__


def test_repositories_without_safetensors(hub: Hub, checkpoint: Path, tmp_path: Path, invoke: Invoke) -> None:
    for name, files in {"pickles": ["pytorch_model.bin"], "nothing": [], "config": ["model.safetensors"]}.items():
        directory = tmp_path / name
        directory.mkdir()
        for file in files:
            (directory / file).write_bytes(b"x" * 64)
        if name != "config":
            shutil.copy(checkpoint / "config.json", directory)
        hub.repositories[f"owner/{name}"] = directory
    for name, kind in {"pickles": UnsupportedModelError, "nothing": CheckpointNotFoundError}.items():
        result = invoke("plan", f"owner/{name}", "--remote", "--json")
        assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (4, kind.__name__)
    assert "expected config.json" in invoke("plan", "owner/config", "--remote").stderr


def test_damaged_headers_and_indexes(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    hub.repositories["owner/damaged"] = directory
    shard = sorted(directory.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="expected a file of more than"), remote_checkpoint("owner/damaged"):
        pass
    shard.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="headers of safetensors"), remote_checkpoint("owner/damaged"):
        pass
    shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match="index lists"), remote_checkpoint("owner/damaged"):
        pass
    shard.write_bytes(whole)
    index = json.loads((directory / INDEX_FILE).read_text())
    name = next(key for key, file in index["weight_map"].items() if file == shard.name)
    index["weight_map"][f"{name}.more"] = shard.name
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a file without it"), remote_checkpoint("owner/damaged"):
        pass


def test_no_network(hub: Hub, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        result = invoke("plan", "owner/tiny", "--remote", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["error"]["type"] == HubUnreachableError.__name__
    assert "HF_ENDPOINT" in result.stderr


def test_a_directory_is_not_remote(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("plan", checkpoint, "--remote")
    assert result.exit_code == 2
    assert "leave it out" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_the_environment_says_where_the_hub_is(hub: Hub, tmp_path: Path, offline: bool) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path)}
    arguments = ["plan", "owner/tiny", "--remote", "--ram", "64MiB", "--context", "64", "--json"]
    found = subprocess.run(
        [sys.executable, "-m", "offload.cli", *arguments], capture_output=True, text=True, env=environment
    )
    if offline:
        assert found.returncode == 5
        assert "unset HF_HUB_OFFLINE" in found.stderr
    else:
        assert (found.returncode, found.stderr) == (0, "")
        assert Plan.from_json(found.stdout).model == "owner/tiny"
    assert not list((tmp_path / "home").rglob("*.json")), "nothing is in the cache"
