"""Every command with a dense model: what means something works, what does not says why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from placement.datasheets import datasheet
from placement.plan import Plan
from tests.cli.conftest import Invoke, character_tokenizer
from tests.cli.hub_server import Hub, running
from tests.dense_models import LAYERS, write_dense

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_dense(tmp_path_factory.mktemp("models") / "llama", "llama")
    character_tokenizer().save_pretrained(directory)
    return directory


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_plan(invoke: Invoke, dense: Path, tmp_path: Path) -> None:
    options = ("--ram", "200MiB", "--nvme", tmp_path / "store", "--context", "64")
    result = invoke("plan", dense, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    text = flat(result.stdout)
    assert "llama, a dense model, linear layers in fp32, output layer in fp32" in text
    assert "dense weights ram" in text
    assert not any(word in text for word in ("experts in", "all 0 experts", "slots", "disk needed"))
    plan = Plan.from_json(invoke("plan", dense, *options, "--json").stdout)
    assert plan == offload.plan(dense, ram="200MiB", context=64)
    assert (plan.expert_count, plan.disk_nbytes) == (0, 0)
    assert not (tmp_path / "store").exists()


def test_a_plan_of_this_machine_is_predicted(invoke: Invoke, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = datasheet(cpu="ddr5-desktop", drive="gen4")
    monkeypatch.setattr("offload.preparation.cached_profile", lambda root: profile)
    text = flat(invoke("plan", dense, "--ram", "200MiB", "--context", "64").stdout)
    assert re.search(r"expected decode [\d.]+ tokens/s .* no experts, nothing is routed", text)
    result = invoke("plan", dense, "--ram", "200MiB", "--simulate")
    assert (result.exit_code, "dense model without experts to simulate" in result.stderr) == (2, True)


@pytest.mark.parametrize("options", [("--skew", "0.5"), ("--trace", "some.trace")])
def test_routing_cannot_be_stated(options: tuple[str, ...], invoke: Invoke, dense: Path) -> None:
    result = invoke("plan", dense, "--ram", "200MiB", "--cpu", "ddr5-desktop", *options)
    assert (result.exit_code, "routes nothing" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("model", "quant", "vram", "streams", "speed"),
    [
        # Tokens/s that the link, or VRAM's own bandwidth, allows and no more; and no less than half of it.
        ("llama-2-7b", None, "8GiB", True, (1.2, 4.0)),
        ("llama-2-7b", None, "24GiB", False, (30, 75)),
        ("llama-3.3-70b", "int4", "24GiB", True, (0.7, 2.0)),
        ("llama-3.3-70b", None, "24GiB", True, (0.1, 0.3)),
    ],
)
def test_public_models_on_a_desktop(
    model: str, quant: str | None, vram: str, streams: bool, speed: tuple[float, float], invoke: Invoke
) -> None:
    options = ["--gpu", "rtx4090", "--machine-ram", "192GiB", "--vram", vram, "--context", "4096"]
    options += [] if quant is None else ["--quant", quant]
    plan = Plan.from_json(invoke("plan", CONFIGS / model, *options, "--json").stdout)
    assert plan.vram is not None and plan.prediction is not None
    assert (plan.vram.window_layers > 0, plan.vram.head, plan.vram.slots) == (streams, True, 0)
    assert plan.vram.use.total_nbytes <= offload.sizes.parse_size(vram, "vram")
    decode, prefill = plan.prediction.decode, plan.prediction.prefill
    assert speed[0] < decode.tokens_per_s < speed[1]
    assert (decode.binds == "link") == streams
    # A prompt's tokens share what streams.
    assert prefill.tokens_per_s > 20 * decode.tokens_per_s
    text = flat(invoke("plan", CONFIGS / model, *options).stdout)
    assert "is not run" not in text and "experts in" not in text
    assert ("stream through a window of 2 there in every pass" in text) == streams
    assert ("what if the CPU computed alone" in text) == streams


def test_the_page_has_no_map_of_experts(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    options = ("--gpu", "rtx4090", "--machine-ram", "64GiB", "--vram", "8GiB", "--context", "2048", "--html", file)
    result = invoke("plan", CONFIGS / "llama-2-7b", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    text = file.read_text()
    assert "Where experts are most of the time" not in text
    assert "stream through a window of 2" in text
    assert "Seconds per token" in text


def test_remote(dense: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running(Hub({"owner/dense": dense}, set())) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        budgets = ("--ram", "200MiB", "--context", "64", "--json")
        remote = Plan.from_json(invoke("plan", "owner/dense", "--remote", *budgets).stdout)
    local = Plan.from_json(invoke("plan", dense, *budgets).stdout)
    assert replace(remote, model="") == replace(local, model="")


@pytest.mark.parametrize("above", [(), ("--device", "host", "--vram")])
def test_run_and_bench(above: tuple[str, ...], invoke: Invoke, dense: Path, tmp_path: Path) -> None:
    if above:
        above = (*above, str(offload.plan(dense, ram="1GiB", context=64).ram.dense_nbytes // 2))
    options: tuple[Any, ...] = ("--ram", "1GiB", "--nvme", tmp_path, "--context", "64", *above)
    result = invoke("run", dense, "-p", "a = b + ", "-n", "8", *options, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["new_tokens"]) == (0, 8)
    assert (found["plan"]["expert_count"], found["stats"]["moe_steps"]) == (0, 0)
    spoken = invoke("run", dense, "-p", "a = b + ", "-n", "8", *options)
    assert "hit rate" not in spoken.stderr
    assert ("of dense weights streamed" in spoken.stderr) == bool(above)
    amount = ("--prompt", "12", "-n", "4", "--prompts", "1", "--no-probe", "--json")
    result = invoke("bench", dense, *options, *amount)
    assert result.exit_code == 0
    figures = json.loads(result.stdout)["figures"]
    assert figures["decode, tokens/s"]["measured"] > 0
    assert not any("experts" in name or "hit rate" in name for name in figures)
    assert not list(tmp_path.iterdir())


def test_what_is_of_experts_says_so(invoke: Invoke, dense: Path, tmp_path: Path) -> None:
    result = invoke("quantize", dense, "--quant", "int4", "--nvme", tmp_path / "store")
    assert (result.exit_code, "no store is written" in result.stderr) == (2, True)
    assert not (tmp_path / "store").exists()
    trace = ("trace", "record", dense, "-p", "a = b", "-o", tmp_path / "some.trace", "--ram", "1GiB", "--context", "64")
    result = invoke(*trace, "--nvme", tmp_path)
    assert (result.exit_code, "it has no routing to record" in result.stderr) == (1, True)
    assert not (tmp_path / "some.trace").exists()
    result = invoke("plan", dense, "--ram", "1GiB", "--quant", "experts=int4")
    assert (result.exit_code, "dense model without experts" in result.stderr) == (2, True)
    result = invoke("plan", dense, "--ram", "1MiB", "--context", "64")
    assert (result.exit_code, 'quant="int4"' in result.stderr) == (3, True)


def test_layers_are_as_many_as_the_config_has(dense: Path) -> None:
    """Guards the shape that the tests of streaming rely on."""
    plan = offload.plan(dense, ram="1GiB", context=64, dtype=torch.float32)
    assert plan.ram.dense_nbytes > 0.9 * LAYERS * 4 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 72)
