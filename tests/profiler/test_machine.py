"""What a profile belongs to, and keeping it."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placement.hardware_profile import HardwareProfile
from profiler.cache import profile_path, read_profile, write_profile
from profiler.machine import Machine, gpus, now, this_machine
from tests.placement.machines import machine

ONE = Machine("a CPU", 8, 1 << 35, (), ("torch 1",), 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"cpu": "another"},
        {"cores": 4},
        {"ram_nbytes": 1 << 34},
        {"gpus": ("a GPU",)},
        {"versions": ("torch 2",)},
        {"disk": 4},
    ],
    ids=str,
)
def test_another_machine_has_another_fingerprint(changed: dict[str, Any]) -> None:
    assert replace(ONE, **changed).fingerprint != ONE.fingerprint


def test_a_little_less_memory_is_the_same_machine() -> None:
    assert replace(ONE, ram_nbytes=ONE.ram_nbytes + (1 << 20)).fingerprint == ONE.fingerprint


def test_this_machine(tmp_path: Path) -> None:
    found = this_machine(tmp_path)
    assert found == this_machine(tmp_path)
    assert found.cores >= 1
    assert found.disk == tmp_path.stat().st_dev
    assert any(version.startswith("torch ") for version in found.versions)
    assert this_machine(tmp_path, cpuinfo=tmp_path / "none").cpu


def test_the_processor_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: Fast\ncpu family : 25\nmodel : 1\nflags : sse avx2 avx512f\n\nmodel name: Other\n"
    )
    assert this_machine(tmp_path, cpuinfo=cpuinfo).cpu == "Fast (family 25 model 1) avx2 avx512f"


class NvmlError(Exception):
    pass


def nvml(*, fails: bool = False) -> types.SimpleNamespace:
    def start() -> None:
        if fails:
            raise NvmlError

    return types.SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _handle: "Some GPU",
        nvmlDeviceGetMemoryInfo=lambda _handle: types.SimpleNamespace(total=24 << 30, free=20 << 30),
    )


def test_accelerators_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    (found,) = gpus()
    assert (found.name, found.total_nbytes, found.free_nbytes) == ("Some GPU", 24 << 30, 20 << 30)
    assert this_machine(tmp_path).gpus == ("Some GPU 24 GiB",)


def test_no_driver_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(fails=True))
    assert gpus() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == ()


def profile_of(one: Machine) -> HardwareProfile:
    made = machine(gpu=False)
    return replace(made, provenance=replace(made.provenance, fingerprint=one.fingerprint))


def test_a_profile_is_kept_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet"
    assert read_profile(directory, ONE) is None
    profile = profile_of(ONE)
    assert write_profile(directory, ONE, profile) == profile_path(directory, ONE)
    assert read_profile(directory, ONE) == profile
    assert read_profile(directory, replace(ONE, cores=1)) is None
    assert [path.name for path in directory.iterdir()] == [profile_path(directory, ONE).name]


def test_what_is_no_profile_is_measured_again(tmp_path: Path) -> None:
    profile_path(tmp_path, ONE).write_text("{")
    assert read_profile(tmp_path, ONE) is None
    other = replace(ONE, cores=1)
    profile_path(tmp_path, ONE).write_text(profile_of(other).to_json())
    assert read_profile(tmp_path, ONE) is None


def test_a_failed_write_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(tmp_path, ONE, profile_of(ONE))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_profile(tmp_path, ONE, profile_of(ONE))
    assert len(list(tmp_path.iterdir())) == 1
    assert read_profile(tmp_path, ONE) is not None


def test_dates_are_utc_to_the_minute() -> None:
    assert len(now()) == len("2026-01-01T00:00Z")
    assert now().endswith("Z")
