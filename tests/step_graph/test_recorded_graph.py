"""A recorded graph replays torch's operations into the same memory, and refuses what a GPU could not capture."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from offload.errors import CaptureError
from offload.step_graph.recorded_graph import RecordedGraph


def _capture(step: Callable[[], None]) -> RecordedGraph:
    graph = RecordedGraph()
    graph.capture(step)
    return graph


def test_a_replay_computes_from_what_its_inputs_hold_now() -> None:
    x, w, out = torch.randn(3, 8), torch.randn(5, 8), torch.zeros(3, 2)
    kept = torch.zeros(4, 5)
    place = torch.tensor([1])

    def step() -> None:
        y = torch.nn.functional.linear(x, w).view(3, 5)
        top = torch.topk(torch.softmax(y, dim=-1), 2)
        kept.index_copy_(0, place, y[:1])
        z = y.transpose(0, 1).contiguous().add_(1.0)
        out.copy_(top.values * z.sum() + top.indices)

    def expected() -> torch.Tensor:
        y = x @ w.T
        top = torch.topk(torch.softmax(y, dim=-1), 2)
        return top.values * (y + 1.0).sum() + top.indices

    graph = _capture(step)
    for row in (0, 3):
        x.normal_()
        place.fill_(row)
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out, expected())
        torch.testing.assert_close(kept[row], x[0] @ w.T)


def test_numbers_are_those_of_the_capture() -> None:
    """What a CUDA graph would do too: Python runs once."""
    calls = []
    x, out = torch.zeros(2), torch.zeros(2)

    def step() -> None:
        calls.append(1)
        out.copy_(x + len(calls))

    graph = _capture(step)
    graph.replay()
    graph.replay()
    assert calls == [1]
    assert out.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x.sum().item(), "reads a value"),
        (lambda x: bool((x > 0).all()), "reads a value"),
        (lambda x: torch.equal(x, x + 1), "compares values"),
        (lambda x: x.nonzero(), "depends on values"),
        (lambda x: x[x > 0].sum(), "depends on values"),
        (lambda x: x.masked_select(x > 0), "depends on values"),
        (lambda x: x + torch.tensor([1.0, 2.0]), "numbers of Python"),
    ],
)
def test_what_would_wait_for_a_device_is_refused(step: Callable[[torch.Tensor], object], message: str) -> None:
    graph = RecordedGraph()
    x = torch.ones(2)
    with pytest.raises(CaptureError, match=message):
        graph.capture(lambda: (step(x), None)[1])
    graph.replay()


def test_what_others_write_is_poisoned_in_a_replay() -> None:
    """A kernel that is no operation of torch's and was not queued by `call` would leave what the capture left."""
    x, out = torch.ones(4), torch.zeros(4)

    def step() -> None:
        made = torch.empty(4)
        np.copyto(made.numpy(), x.numpy())
        out.copy_(made)

    graph = _capture(step)
    assert out.tolist() == [1.0] * 4
    graph.replay()
    assert out.isnan().all()


def test_calls_and_words_in_order() -> None:
    graph = RecordedGraph()
    words = np.zeros(2, np.uint32)
    request, reply = (words.ctypes.data + 4 * index for index in range(2))
    seen: list[tuple[int, float]] = []
    x, y = torch.zeros(1), torch.zeros(1)

    def kernels() -> None:
        # Operations in a call are the call's.
        seen.append((int(words[0]), float(y.add(1.0)[0])))

    def step() -> None:
        graph.copy(y, x)
        graph.write_value(request, 5)
        graph.call(kernels)
        graph.wait_value(reply, 6)
        graph.write_value(reply, 0)

    def server() -> None:
        word = ctypes.c_uint32.from_address(request)
        while word.value != 5:
            pass
        word.value = 0
        ctypes.c_uint32.from_address(reply).value = 6

    for way in (graph.run, graph.capture, lambda _: graph.replay()):
        x += 1
        thread = threading.Thread(target=server)
        thread.start()
        way(step)
        thread.join()
        assert words[1] == 0
    assert [value for _, value in seen] == [2.0, 3.0, 4.0]


def test_a_step_that_fails_leaves_nothing() -> None:
    graph = RecordedGraph()
    out = torch.zeros(1)

    def step() -> None:
        out.add_(1.0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        graph.capture(step)
    graph.replay()
    assert out.tolist() == [1.0]
