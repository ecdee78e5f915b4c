"""Every benchmark end to end on a tiny model. Speed is not looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import benchmarks.__main__ as cli
from benchmarks import (
    decision_cost,
    decode,
    decode_attention,
    disk,
    formats,
    kernels,
    kv_kernels,
    load,
    memory,
    overhead,
    plan_accuracy,
    quality,
    replayed_steps,
    simulator,
    step,
)
from benchmarks.checkpoints import budget_for, ensure_checkpoint, plan_for, weight_files
from benchmarks.harness import GateError, Report, Row, Spread
from benchmarks.peers import PeerError, Process
from benchmarks.raw_io import Block, blocks_of, copy_files, read_blocks
from benchmarks.sessions import ModelOptions
from cpu_kernels.wide_linear import multiplies_natively
from offload.devices.host import HostDevice
from offload.measuring.reads import FileReads
from offload.measuring.subjects import RuntimeSubjects
from placement.curves import SmallProducts
from placement.datasheets import datasheet
from placement.hardware_profile import Speeds
from prefetch.policies.names import POLICIES
from tests.benchmarks.conftest import TINY

DECODE = decode.DecodeScale(
    resident=(0.25,), prefills=(16,), prompt_tokens=8, turn_tokens=2, accelerate_tokens=1, rounds=2, gate_layers=1,
    gate_tokens=4,
)  # fmt: skip
DISK = disk.DiskScale(turn_nbytes=1 << 18, rounds=2, block_sizes=(4096, 1 << 30), threads=(1, 2))
RUNS: dict[str, Callable[[Path], Report]] = {
    "disk": lambda work: disk.run(work, TINY, DISK),
    "decode": lambda work: decode.run(work, TINY, DECODE),
    "load": lambda work: load.run(work, TINY, load.LoadScale(rounds=2)),
    "step": lambda work: step.run(work, TINY, step.StepScale(rounds=2, tokens=(1, 3))),
    "memory": lambda work: memory.run(work, TINY, memory.MemoryScale(budgets=(0.5,), prompt_tokens=9, new_tokens=3)),
    "formats": lambda work: formats.run(formats.FormatsScale(rows=40, columns=256, rounds=2)),
    "quality": lambda work: quality.run(work, quality.QualityScale(1, ("bf16", "int4"))),
    "kernels": lambda work: kernels.run(kernels.QUICK),
    "decode_attention": lambda work: decode_attention.run(decode_attention.QUICK),
    "kv_kernels": lambda work: kv_kernels.run(kv_kernels.QUICK),
    "overhead": lambda work: overhead.run(work, TINY, overhead.OverheadScale(rounds=2, steps=1)),
    "decision_cost": lambda work: decision_cost.run(work, decision_cost.QUICK),
    "replayed_steps": lambda work: replayed_steps.run(
        work, replace(TINY, dtype="float32"), replayed_steps.ReplayScale(steps=3, before=3, columns=64, rounds=2)
    ),
    "simulator": lambda work: simulator.run(simulator.SimulatorScale(3, 8, 2, 6, 1)),
}

EXPECTED_ROWS = {
    "disk": {"Expert reads": 2, "The disk, raw O_DIRECT reads in random order": 2},
    "decode": {
        "Prefill, everything in RAM": 3,
        "Decode, everything in RAM": 4,
        "Decode by budget": 3,
        "Limits measured in this run": 3,
    },
    "load": {"Loading": 3, "Stages of loading, seconds": 3, "Plain loops, seconds": 5},
    "step": {"A MoE layer, microseconds": 2},
    "memory": {"Peak memory": 3},
    "formats": {"RMS error over RMS of the weights": 6, "Packing on one core": 4},
    "quality": {"Perplexity": 2},
    "decode_attention": {"bfloat16": 2, "float32": 2},
    "kv_kernels": {
        "head 128, GQA 4": 2,
        "5% of blocks by landmarks, bf16, head 128": 1,
        "5% of blocks by landmarks, int4, head 128": 1,
        "MLA 512 + 64, 16 heads": 2,
    },
    # Where the CPU has no products of bf16, ours of many tokens is there too.
    "kernels": {
        "Linear, N=64 K=128": 28 + (not multiplies_natively(torch.bfloat16)),
        "2 experts, hidden 128, intermediate 64, tokens each": 20,
    },
    "overhead": {
        "A layer without experts, microseconds": 16,
        "A layer beyond weights and attention, microseconds": 8,
    },
    "decision_cost": {
        "Scheduler, a layer": 8,
        "Cache policy, a layer": len(POLICIES),
        "Decode where nothing can be foreseen": 2,
    },
    "replayed_steps": {
        "Attention of one token over 64, milliseconds": 3,
        "A layer of a replayed step, microseconds": 2,
    },
    "simulator": {"Expert events": 12},
}


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine._BANDWIDTH_NBYTES", 1 << 20)
    monkeypatch.setattr("benchmarks.machine._GEMM_SIZE", 64)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("local_processes")
@pytest.mark.parametrize("name", RUNS)
def test_runs_and_reports(name: str, work: Path) -> None:
    report = RUNS[name](work)
    assert {title: len(rows) for title, rows in report.tables.items()} == EXPECTED_ROWS[name]
    assert report.gates
    assert (name == "step") == (not report.targets)
    for rows in report.tables.values():
        assert len({tuple(row) for row in rows}) == 1
        for value in (value for row in rows for value in row.values()):
            if isinstance(value, Spread):
                assert value.minimum <= value.median <= value.maximum
    assert not list(work.glob("scratch-*"))
    json.dumps(report.as_dict())


@pytest.mark.usefixtures("local_processes")
def test_runs_beside_other_processes_are_told_apart() -> None:
    pairs: list[tuple[Row, dict[str, float]]] = [
        ({}, {"decode": 1.0, "prefill": 0.5}),
        ({}, {"decode": 0.1, "prefill": -0.2}),
        ({}, {"decode": -0.3, "prefill": 0.0}),
    ]
    report = Report("plan_accuracy")
    plan_accuracy._tell_disturbed(report, [False] * 3, pairs)
    assert not report.notes
    plan_accuracy._tell_disturbed(report, [True, False, False], pairs)
    (note,) = report.notes
    assert "1 of 3 runs" in note
    assert "decode 20.0% off, 30% at worst, prefill 10.0% off, 20% at worst" in note


def test_predictions_beside_measurements(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid, with a profile from datasheets in the place of the measurement, which takes too long."""
    profile = datasheet(cpu="ddr5-desktop", drive="gen4")
    monkeypatch.setattr(plan_accuracy, "measure_profile", lambda root, quick, say: (profile, root))
    probed: list[Path] = []

    def probe(subjects: RuntimeSubjects, *_: object) -> Speeds:
        assert isinstance(subjects._disk, FileReads)
        probed.extend(subjects._disk.paths)
        return Speeds(0.5, 0.8, 0.9, small_experts=SmallProducts(1e3, 1e6, 0.7, 0.6))

    monkeypatch.setattr(plan_accuracy, "probe", probe)
    monkeypatch.setattr("benchmarks.accuracy_run._LEAST_TURN_S", 0.0)
    # Peaks of this process, in which much else was loaded before, are none of the models'.
    monkeypatch.setattr("benchmarks.sessions.reset_peak", lambda: None)
    works = (plan_accuracy.Work(1, 8), plan_accuracy.Work(2, 4))
    scale = plan_accuracy.AccuracyScale((TINY,), (None, "int8"), (0.5, 1.0), works, 2, True)
    assert {cell.work for cell in plan_accuracy.grid(scale)} == set(works)
    # The first call stops after a run, and the next one goes on from there.
    first = plan_accuracy.run(work, replace(scale, limit_s=0.0))
    assert first.notes[0] == "3 of 4 runs are still to be measured."
    report = plan_accuracy.run(work, scale)
    rows = report.tables["Predicted and measured"]
    assert [row["speeds of decode"] for row in rows] == [
        "memory 0.50, arithmetic 0.80, disk 0.90, small_experts 0.70 0.60"
    ] * 4
    assert first.tables["Predicted and measured"] == rows[:1]
    stores = {path.parent for path in probed}
    assert len(stores) == 2, "the disk is probed on the store of each format"
    assert {path.parent for path in stores} == {work / "stores"}
    assert {(row["format"], row["resident"]) for row in rows} == {
        ("bfloat16", "50%"), ("bfloat16", "100%"), ("int8", "50%"), ("int8", "100%"),
    }  # fmt: skip
    assert [row["hit rate"] for row in rows if row["resident"] == "100%"] == [1.0, 1.0]
    assert report.gates
    assert len(report.targets) == 10
    json.dumps(report.as_dict())


@pytest.mark.usefixtures("local_processes")
@pytest.mark.parametrize("name", ["decode", "step"])
def test_wrong_experts_are_not_measured(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HostDevice.run_experts

    def wrong(self: HostDevice, layer: Any, batch: Any, hidden: torch.Tensor, out: torch.Tensor) -> None:
        right(self, layer, batch, hidden, out)
        out *= 1.1

    monkeypatch.setattr(HostDevice, "run_experts", wrong)
    with pytest.raises(GateError, match="tolerance"):
        RUNS[name](work)


def test_wrong_reads_are_not_measured(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.EngineReads, "bytes_of", lambda self, bundle: b"wrong")
    with pytest.raises(GateError, match="engine = checkpoint: differ"):
        RUNS["disk"](work)


def test_command_line_writes_json(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_benchmarks", lambda quick: RUNS)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(cli.main, ["disk", "--work", str(work), "--json", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    data = json.loads(text)
    assert data["reports"][0]["name"] == "disk"
    assert {"cpu", "cpu_cores", "ram_nbytes", "versions", "date", "command", "commit"} <= set(data["provenance"])
    assert str(work) not in text


def test_command_line_reports_nothing_unless_equal(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_benchmarks", lambda quick: RUNS)
    monkeypatch.setattr(disk.EngineReads, "bytes_of", lambda self, bundle: b"wrong")
    out = tmp_path / "out.json"
    result = CliRunner().invoke(cli.main, ["disk", "--work", str(work), "--json", str(out)])
    assert result.exit_code == 1
    assert "not equal" in result.output
    assert "GB/s" not in result.output
    assert not out.exists()


def test_processes_answer_fail_and_end(work: Path) -> None:
    checkpoint = ensure_checkpoint(TINY, work)
    options = ModelOptions("ours", str(checkpoint), 1, str(work / "stores"))
    with Process() as process:
        with pytest.raises(PeerError, match="DoesNotFitError"):
            process.call("open", **vars(options))
        ram = budget_for(checkpoint, 1.0, 1024)
        opened = process.call("open", **vars(replace(options, ram=ram)))
        assert opened["slots"] == opened["experts"] == TINY.layers * TINY.experts
        process.call("session", method="start", prompt=[1, 2, 3])
        assert len(process.call("session", method="decode", count=2)["tokens"]) == 2
    assert process._child.returncode == 0
    with pytest.raises(PeerError, match="exit code"):
        process.receive()


def test_budgets_hold_the_share_of_experts(work: Path) -> None:
    checkpoint = ensure_checkpoint(TINY, work)
    total = TINY.layers * TINY.experts
    for share, slots in ((0.25, total // 4), (1.0, total), (0.0, 2)):
        plan = plan_for(checkpoint, budget_for(checkpoint, share, 64), 64)
        assert plan.ram_slots == slots


def test_raw_copies_leave_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    files = weight_files(ensure_checkpoint(TINY, work))
    monkeypatch.setattr("benchmarks.raw_io.COPY_BLOCK_NBYTES", 8192)
    # The copy is removed at its end: keep it for the comparison.
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    expected = b"".join(file.read_bytes() for file in files)
    for overlapped in (True, False):
        target = work / f"copy-{overlapped}"
        assert copy_files(files, target, skipped_nbytes=8192, overlapped=overlapped) > 0
        assert target.read_bytes()[: len(expected) - 8192] == expected[8192:]


def test_raw_reads_take_every_block_and_stop_at_the_end(work: Path) -> None:
    (file,) = weight_files(ensure_checkpoint(TINY, work))
    blocks = blocks_of([file], 12288)
    assert sum(block.nbytes for block in blocks) == file.stat().st_size
    assert [block.offset for block in blocks] == list(range(0, file.stat().st_size, 12288))
    assert read_blocks([file], blocks, 3) > 0
    assert read_blocks([file], blocks, 3, keep=True) > 0
    with pytest.raises(EOFError, match="the file ends"):
        read_blocks([file], [Block(0, blocks[-1].offset, 1 << 16)], 1)
