"""`quant="auto"`: what the planner chooses is what runs, and what cannot be chosen by is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import offload
from offload import preparation
from offload.cli.plan_ahead import read_specs
from offload.errors import DoesNotFitError, InvalidArgumentError
from offload.hf import spec
from offload.request import make_request
from placement.datasheets import datasheet
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt
from tests.quantised_checkpoints import MXFP4_CONFIG, config_of, mxfp4_tensors, unquantised, write
from tests.tiny_models import build_tiny

CPU = datasheet(cpu="ddr5-desktop", drive="gen4")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "cached_profile", lambda root: CPU)


@pytest.mark.usefixtures("measured")
def test_what_is_chosen_within_a_budget_is_what_runs(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    ram = offload.plan(directory, ram="1GiB", context=64, quant="int8").minimum_ram_nbytes
    assert ram < offload.plan(directory, ram="1GiB", context=64).minimum_ram_nbytes
    auto = offload.load(directory, ram=ram, nvme=store_root, context=64, quant="auto")
    own, *packed = auto.offload.plan.format_options
    assert (own.experts, own.decode_tokens_per_s) == ("fp32", None)
    assert [(one.experts, one.dense, one.head) for one in packed] == [("int8",) * 3, ("int4", "int4", "int8")]
    assert auto.offload.plan == offload.plan(directory, ram=ram, context=64, quant="auto")
    named = offload.load(directory, ram=ram, nvme=store_root, context=64, quant=auto.offload.plan.format)
    assert named.offload.plan.format_options == ()
    assert torch.equal(greedy(auto, prompt()), greedy(named, prompt()))
    for model in (auto, named):
        model.offload.check()
        model.offload.close()


@pytest.mark.usefixtures("measured")
def test_a_part_may_be_left_open(tiny_checkpoint: TinyCheckpoint) -> None:
    plan = offload.plan(
        tiny_checkpoint("qwen3_moe"), ram="1GiB", context=64, quant={"dense": "auto", "experts": "int8"}
    )
    assert [(one.experts, one.dense, one.head) for one in plan.format_options] == [
        ("int8", "fp32", "fp32"),
        ("int8", "int8", "fp32"),
        ("int8", "int4", "fp32"),
    ]


@pytest.mark.usefixtures("measured")
def test_a_quantised_checkpoint_may_stay_what_it_is(tmp_path: Path) -> None:
    config = config_of("gpt_oss", hidden_size=64, intermediate_size=128)
    directory = write(tmp_path, config, mxfp4_tensors(unquantised(config)), MXFP4_CONFIG)
    plan = offload.plan(directory, ram="1GiB", context=64, quant="auto")
    assert [one.experts for one in plan.format_options] == ["bf16", "mxfp4", "int8", "int4"]
    assert plan.format_options[1].head == "int8"


@pytest.mark.usefixtures("measured")
def test_a_model_in_memory_is_weighed_alike(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    expected = offload.plan(tiny_checkpoint("qwen3_moe"), ram="1GiB", context=64, quant="auto")
    model = offload.load(build_tiny("qwen3_moe"), ram="1GiB", nvme=store_root, context=64, quant="auto")
    found = model.offload.plan.format_options
    assert [one.in_words for one in found] == [one.in_words for one in expected.format_options]
    assert [one.decode_tokens_per_s for one in found] == pytest.approx(
        [one.decode_tokens_per_s for one in expected.format_options]
    )
    model.offload.close()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("way", ["checkpoint", "in memory", "config"])
def test_the_model_is_measured_once_for_all_formats(
    way: str, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    measure = spec.measure_on_meta
    monkeypatch.setattr(spec, "measure_on_meta", lambda skeleton: runs.append(skeleton) or measure(skeleton))
    if way == "checkpoint":
        offload.plan(tiny_checkpoint("qwen3_moe"), ram="1GiB", context=64, quant="auto")
    elif way == "in memory":
        made = build_tiny("qwen3_moe")
        offload.load(made, ram="1GiB", nvme=store_root, context=64, quant="auto").offload.close()
    else:
        specs = read_specs(str(tiny_checkpoint("qwen3_moe")), None, "auto", "auto", 64, trust_remote_code=False)
        assert [one.head_format for one in specs] == ["fp32", "int8", "int8"]
    assert len(runs) == 1


def test_without_a_profile_there_is_nothing_to_choose_by(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "cached_profile", lambda root: None)
    with pytest.raises(InvalidArgumentError, match=r"fp32.*run `offload profile`"):
        offload.plan(tiny_checkpoint("qwen3_moe"), ram="1GiB", context=64, quant="auto")


@pytest.mark.usefixtures("measured")
def test_of_an_accelerator_that_is_played_nothing_is_predicted(
    tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    arguments = {"ram": "1GiB", "nvme": store_root, "device": "host", "vram": "1MiB", "context": 64, "quant": "auto"}
    with pytest.raises(InvalidArgumentError, match="of an accelerator that host memory plays"):
        offload.load(tiny_checkpoint("qwen3_moe"), **arguments)


def test_a_gpu_is_judged_by_its_own_speeds(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    desktop = datasheet(cpu="ddr5-desktop", drive="gen4", gpu="rtx4090")
    monkeypatch.setattr(preparation, "cached_profile", lambda root: desktop)
    request = make_request(
        ram="1GiB", nvme=None, context=64, batch=1, prefill_chunk=64, max_memory=None, device="cuda", vram="1GiB",
        quant="auto",
    )  # fmt: skip
    plan = preparation.prepare_checkpoint(tiny_checkpoint("qwen3_moe"), request).plan
    assert plan.vram is not None
    assert plan.prediction is not None
    chosen = next(one for one in plan.format_options if one.experts == plan.format)
    assert chosen.decode_tokens_per_s == plan.prediction.decode.tokens_per_s
    assert all(one.decode_tokens_per_s for one in plan.format_options)
    on_cpu = replace(request, accelerator=None)
    below = preparation.prepare_checkpoint(tiny_checkpoint("qwen3_moe"), on_cpu).plan
    assert [one.decode_tokens_per_s for one in plan.format_options] != [
        one.decode_tokens_per_s for one in below.format_options
    ]


@pytest.mark.usefixtures("measured")
def test_where_no_format_fits_the_smallest_says_what_would(tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    with pytest.raises(DoesNotFitError) as caught:
        offload.plan(directory, ram=1000, context=64, quant="auto")
    named = offload.plan(directory, ram="1GiB", context=64, quant="int4")
    assert caught.value.minimum_ram_bytes == named.minimum_ram_nbytes
