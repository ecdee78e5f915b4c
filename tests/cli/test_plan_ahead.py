"""`offload plan` for machines from datasheets, and its report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from placement.plan import Plan
from tests.cli.conftest import Invoke
from tests.tiny_models import tiny_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
MIXTRAL = CONFIGS / "mixtral-8x7b"
DESKTOP = ("--gpu", "rtx4090", "--machine-ram", "64GiB", "--quant", "int4", "--context", "4096")


def test_a_desktop_with_a_gpu(invoke: Invoke) -> None:
    result = invoke("plan", MIXTRAL, *DESKTOP, "--what-if", "ram=+32GiB", "--what-if", "gpu=rtx5090,nvme=gen5")
    assert (result.exit_code, result.stderr) == (0, "")
    text = re.sub(r"\s+", " ", result.stdout)
    for part in (
        "rtx4090 (pcie4)", "datasheet: a prediction, nothing was run", "what if ram=+32GiB", "what if gpu=rtx5090,nvme",
        "twice as fast", "equally popular", "places by sizes: all dense layers, ", "of 256", "decode", "prefill",
    ):  # fmt: skip
        assert part in text, part


def test_a_kv_cache_in_blocks_lies_below_the_gpu(invoke: Invoke) -> None:
    long = (*DESKTOP[:-1], "32768", "--kv", "int8", "--kv-ram", "1GiB")
    result = invoke("plan", MIXTRAL, *long, "--json")
    plan = Plan.from_json(result.stdout)
    assert (result.exit_code, plan.kv_tier) == (0, "ram")
    assert plan.kv is not None and plan.vram is not None
    assert (plan.kv.format, plan.vram.kv_layers) == ("int8", ())
    assert plan.kv.ram_nbytes <= 1 << 30
    assert plan.kv.spills_at_tokens is not None
    assert "in int8 blocks" in re.sub(r"\s+", " ", invoke("plan", MIXTRAL, *long).stdout)


@pytest.mark.parametrize("machine", [("--gpu", "rtx4090"), ("--cpu", "ddr5-desktop")])
@pytest.mark.parametrize(
    ("of_kv", "said"),
    [
        (("--kv", "int4"), 'kv="int4": layer 0 of'),
        (("--kv", "fp8", "--kv-ram", "1KiB"), "kv_ram=1024: the blocks"),
    ],
)
def test_a_kv_cache_that_cannot_be_is_refused_as_at_hand(
    machine: tuple[str, ...], of_kv: tuple[str, ...], said: str, tmp_path: Path, invoke: Invoke
) -> None:
    """Latents of 16 channels make no groups of 32; a bound must hold the blocks that are written to."""
    tiny_config("deepseek_v3").save_pretrained(tmp_path)
    result = invoke("plan", tmp_path, *machine, *of_kv, "--context", "64")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {said}" in result.stderr
    refused = json.loads(invoke("plan", tmp_path, *machine, *of_kv, "--context", "64", "--json").stdout)
    assert refused["error"]["type"] == "InvalidArgumentError"


def test_json_is_a_plan_within_the_budgets(invoke: Invoke) -> None:
    result = invoke("plan", MIXTRAL, *DESKTOP, "--vram", "10GiB", "--ram", "20GiB", "--skew", "0.8", "--json")
    plan = Plan.from_json(result.stdout)
    assert plan.vram is not None
    assert plan.vram.use.total_nbytes <= 10 << 30
    assert plan.peak_ram_nbytes <= 20 << 30
    assert plan.prediction is not None
    assert plan.prediction.basis == "datasheet"
    assert "rank^-0.8" in plan.prediction.routing


def test_formats_that_are_left_open_are_weighed(invoke: Invoke, tmp_path: Path) -> None:
    asked = ("plan", MIXTRAL, "--gpu", "rtx4090", "--machine-ram", "64GiB", "--context", "4096", "--quant", "auto")
    plan = Plan.from_json(invoke(*asked, "--json").stdout)
    named = Plan.from_json(invoke(*asked[:-1], plan.format, "--json").stdout)
    assert replace(plan, format_options=()) == named
    assert [one.in_words for one in plan.format_options] == ["bf16", "int8", "int4 with the output layer in int8"]
    fastest = max(plan.format_options, key=lambda one: one.decode_tokens_per_s or 0)
    assert fastest.experts == plan.format == "int4"
    result = invoke(*asked, "--html", tmp_path / "plan.html")
    written = re.sub(r"\s+", " ", (tmp_path / "plan.html").read_text())
    for option in plan.format_options:
        assert option.speed_in_words in re.sub(r"\s+", " ", result.stdout)
        assert option.speed_in_words in written


def test_more_of_a_part_is_no_slower(invoke: Invoke) -> None:
    speeds = []
    for drive in ("sata", "gen3", "gen5"):
        arguments = ["--cpu", "ddr5-desktop", "--drive", drive, "--ram", "12GiB", "--quant", "int4", "--json"]
        plan = Plan.from_json(invoke("plan", MIXTRAL, *arguments).stdout)
        assert plan.prediction is not None
        assert plan.vram is None
        speeds.append(plan.prediction.decode.tokens_per_s)
    assert speeds == sorted(speeds)
    assert speeds[2] > 4 * speeds[0]


def test_what_does_not_fit_says_what_does(invoke: Invoke) -> None:
    arguments = ["plan", MIXTRAL, "--cpu", "ddr5-desktop", "--context", "32768", "--ram", "4GiB"]
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (3, "")
    tokens = re.search(r"With --context (\d+) it fits", result.stderr)
    assert tokens
    assert invoke(*arguments[:5], tokens[1], *arguments[6:]).exit_code == 0
    result = invoke(*arguments[:6], "--ram", "1GiB", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["minimum_ram_bytes"] > 1 << 30
    assert "No shorter context fits" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "rtx9999"], "known: rtx3060"),
        (["--drive", "tape"], "known: sata"),
        (["--gpu", "rtx4090", "--what-if", "more"], "expected part=value"),
        (["--gpu", "rtx4090", "--what-if", "ram=lots"], "ram="),
        (["--gpu", "rtx4090", "--what-if", "disk=gen5"], "known: ram, vram, nvme"),
        (["--cpu", "ddr5-desktop", "--what-if", "link=pcie5"], "needs a GPU"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_named(invoke: Invoke, arguments: list[str], said: str) -> None:
    result = invoke("plan", MIXTRAL, "--quant", "int4", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nonsense"}, "does not recognize this architecture. Fix: a version of transformers"),
        ({"model_type": "t5"}, "no causal language model for 't5'"),
        ({"model_type": "bert"}, "expected a decoder whose layers can be told"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": "many"}, "'num_hidden_layers' expected int, got str"),
        ({"model_type": "qwen3_moe", "num_attention_heads": 0}, "Fix: check its sizes"),
    ],
    ids=str,
)
def test_a_config_of_no_model_is_refused_in_a_line(
    config: dict[str, object], said: str, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("plan", tmp_path, "--gpu", "rtx4090")
    assert (result.exit_code, result.stdout) == (4, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("bare", ["4", "0016", "65535"])
def test_a_size_without_its_unit_is_asked_for(invoke: Invoke, bare: str) -> None:
    result = invoke("plan", MIXTRAL, "--gpu", "rtx4090", "--machine-ram", bare)
    assert result.exit_code == 2
    assert f"{bare!r} has no unit" in result.stderr


def test_a_machine_that_was_not_measured(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = invoke("plan", MIXTRAL, "--skew", "1")
    assert result.exit_code == 2
    assert "offload profile" in result.stderr


@pytest.mark.parametrize("option", [("--html",), ("--simulate", "--skew", "1", "--timeline")])
def test_a_report_that_has_no_place_is_refused_before_any_work(
    option: tuple[str, ...], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.cli.plan._plan_ahead", lambda *_: pytest.fail("planned all the same"))
    result = invoke("plan", MIXTRAL, *DESKTOP, *option, tmp_path / "missing" / "report")
    assert (result.exit_code, result.stdout) == (5, "")
    assert f"there is no directory {tmp_path / 'missing'}" in result.stderr


def test_the_report_stands_alone(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = invoke("plan", MIXTRAL, *DESKTOP, "--html", file, "--what-if", "ram=+32GiB")
    assert result.exit_code == 0, result.stderr
    text = file.read_text()
    for part in (
        "Memory by tier",
        "The cheapest change that doubles",
        "this plan",
        "expert slots",
        "Where experts are",
        "Decode by RAM",
        "Decode by VRAM",
        "Decode by CONTEXT".title(),
    ):
        assert part.lower() in text.lower(), part
    assert "Plotly" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", text), "nothing is fetched"
