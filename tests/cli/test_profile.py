from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload import machine_profile
from offload.machine_profile import cached_profile, machine_with, profiles_directory
from placement.hardware_profile import HardwareProfile
from profiler.cache import write_profile
from tests.cli.conftest import Invoke
from tests.placement.machines import machine


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Nothing is measured: a made-up profile is kept. The list has `quick` of each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return _measuring(monkeypatch, machine(gpu=False))


def _measuring(monkeypatch: pytest.MonkeyPatch, made: HardwareProfile) -> list[bool]:
    calls: list[bool] = []

    def measure(root: Path, *, quick: bool, say: Any) -> tuple[HardwareProfile, Path]:
        calls.append(quick)
        say("something")
        here = machine_with(root)
        profile = replace(made, provenance=replace(made.provenance, fingerprint=here.fingerprint, notes=("shaky",)))
        return profile, write_profile(profiles_directory(), here, profile)

    monkeypatch.setattr(machine_profile, "measure_profile", measure)
    return calls


def test_measured_once_then_found(invoke: Invoke, measured: list[bool], tmp_path: Path) -> None:
    result = invoke("profile", "--quick", "--nvme", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "something ...\n")
    for part in ("20.00 GB/s", "shaky", "int4", "GFLOP/s", str(tmp_path / "cache")):
        assert part in result.stdout
    result = invoke("profile", "--nvme", tmp_path / "not" / "yet", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert HardwareProfile.from_json(result.stdout) == cached_profile(tmp_path)
    assert measured == [True]
    assert invoke("profile", "--again", "--nvme", tmp_path).exit_code == 0
    assert measured == [True, False]


def test_a_plan_predicts_once_there_is_a_profile(
    invoke: Invoke, measured: list[bool], checkpoint: Path, tmp_path: Path
) -> None:
    plan = ["plan", checkpoint, "--ram", "100MiB", "--nvme", tmp_path, "--dtype", "bfloat16", "--json"]
    assert json.loads(invoke(*plan).stdout)["prediction"] is None
    assert invoke("profile", "--nvme", tmp_path).exit_code == 0
    prediction = json.loads(invoke(*plan).stdout)["prediction"]
    assert prediction["basis"] == "measured"
    assert prediction["decode"]["terms"]["cpu_experts_s"] > 0
    # No curve of this format was measured.
    assert json.loads(invoke(*plan, "--quant", "mxfp4").stdout)["prediction"] is None


def test_a_gpu_is_told(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = machine(gpu=True)
    assert made.gpu is not None
    packed = replace(made.gpu.overheads, layer_s=77e-6)
    _measuring(monkeypatch, replace(made, gpu=replace(made.gpu, packed_overheads=packed)))
    result = invoke("profile", "--nvme", tmp_path)
    assert result.exit_code == 0
    # Memory, the link alone and beside kernels, overheads, and experts at the speed of the memory.
    said = " ".join(result.stdout.split())
    for part in ("32.00 GiB free", "500.00 GB/s", "10.00 GB/s, 7.00 GB/s beside", "50 us a layer", "77 us a layer"):
        assert part in said
    assert "16.00 GiB of RAM may be pinned" in said
    told = json.loads(invoke("profile", "--nvme", tmp_path, "--json").stdout)
    assert told["gpu"]["memory_bytes_per_s"] == 500e9
    assert told["to_gpu"]["overlapped_bytes_per_s"] == 7e9
