"""What a request takes is timed, each way that there is; one that the driver refuses is said."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_doorbell
from benchmarks.gpu_doorbell import doorbell_table
from benchmarks.harness import GateError, Report
from offload.errors import DeviceError
from offload.step_graph.recorded_graph import RecordedGraph


def test_requests_are_answered_and_timed() -> None:
    report = Report("doorbell")
    rows = doorbell_table(report, torch.device("cpu"), 2)
    assert [(row["way"], row["requests"]) for row in rows] == [("recorded", gpu_doorbell.REQUESTS)]
    assert rows[0]["us_per_request"].minimum > 0 and rows[0]["us_per_request"].repeats == 2
    assert [gate.name for gate in report.gates] == ["doorbell by recorded"]


def test_a_way_that_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> RecordedGraph:
        raise DeviceError("cuStreamWriteValue32: the CUDA driver refused with error 801")

    ways = {"stream values": refused, "recorded": RecordedGraph}
    monkeypatch.setattr(gpu_doorbell, "_ways", lambda _device: ways)
    report = Report("doorbell")
    assert [row["way"] for row in doorbell_table(report, torch.device("cpu"), 1)] == ["recorded"]
    assert report.notes == [
        "the doorbell by stream values: cuStreamWriteValue32: the CUDA driver refused with error 801"
    ]


def test_answers_that_do_not_come_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(RecordedGraph):
        def replay(self, meanwhile: object = None) -> None:
            self._operations = [one for one in self._operations if "copy" not in one.__qualname__]
            super().replay()

    monkeypatch.setattr(gpu_doorbell, "_ways", lambda _device: {"forgetful": Forgetful})
    with pytest.raises(GateError, match="answers"):
        doorbell_table(Report("doorbell"), torch.device("cpu"), 1)
