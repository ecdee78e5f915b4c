"""What a CUDA stream asks of the driver, told by a driver that writes down what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from offload.devices.cuda_stream import CudaStream
from offload.devices.mailbox import Mailbox, MailboxLayout, collect, mailbox_memory, ring
from offload.errors import DeviceError
from tests.tiers.readers import random_bytes


class RecordingStream(CudaStream):
    """Copies are written down too."""

    calls: list[tuple[object, ...]]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.calls.append(("copy", target.data_ptr(), source.data_ptr()))


def stream(status: int = 0) -> RecordingStream:
    calls: list[tuple[object, ...]] = []

    def function(name: str) -> Callable[..., int]:
        return lambda *arguments: calls.append((name, *arguments)) or status  # type: ignore[func-returns-value]

    driver = SimpleNamespace(cuStreamWriteValue32_v2=function("write"), cuStreamWaitValue32_v2=function("wait"))
    made = RecordingStream(SimpleNamespace(cuda_stream=77), driver)  # type: ignore[arg-type]
    made.calls = calls
    return made


def test_a_request_and_its_answer_in_order() -> None:
    layout = MailboxLayout(1, 2, 8, torch.float32)
    memory = mailbox_memory(layout, torch.device("cpu"))
    memory[:] = random_bytes(layout.nbytes, seed=1)
    box = Mailbox(layout, memory)
    recorded = stream()
    hidden, ids, weights, sums = torch.zeros(1, 8), torch.zeros(1, 2).long(), torch.zeros(1, 2), torch.zeros(1, 8)
    ring(recorded, box, 4, hidden, ids, weights)
    collect(recorded, box, 4, sums)
    assert recorded.calls == [
        ("copy", box.hidden.data_ptr(), hidden.data_ptr()),
        ("copy", box.ids.data_ptr(), ids.data_ptr()),
        ("copy", box.weights.data_ptr(), weights.data_ptr()),
        ("write", 77, box.request, 5, 0),
        ("wait", 77, box.reply, 5, 1),
        ("write", 77, box.reply, 0, 0),
        ("copy", sums.data_ptr(), box.sums.data_ptr()),
    ]


def test_refusals_are_errors() -> None:
    refused = stream(status=801)
    with pytest.raises(DeviceError, match=r"cuStreamWriteValue32.* error 801"):
        refused.write_value(64, 1)
    with pytest.raises(DeviceError, match=r"cuStreamWaitValue32.* error 801"):
        refused.wait_value(64, 1)
    with pytest.raises(DeviceError, match=r"driver from 11\.7"):
        CudaStream(SimpleNamespace(cuda_stream=0), SimpleNamespace())  # type: ignore[arg-type]
