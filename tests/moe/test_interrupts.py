"""Ctrl-C on every line of a step: the next step is right, and nothing is lost, torn or stuck."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import offload
import prefetch
from tests.moe.rig import Rig

MakeRig = Callable[..., Rig]

WATCHED = tuple(
    str(Path(str(package.__file__)).parent / part)
    for package, part in ((offload, "tiers"), (offload, "moe"), (prefetch, "policies"))
)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that this thread runs in the watched packages."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.seen = 0
        self.raised_at: str | None = None

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # A with statement's line comes again when the lock is let go, where the interpreter delivers no signal.
        if event == "line" and not line.lstrip().startswith("with "):
            self.seen += 1
            if self.seen == self.line:
                self.raised_at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def during(self, call: Callable[[], object]) -> bool:
        """Run `call`; True when it was interrupted."""
        traced = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(traced)
        return False


def _settled_step(rig: Rig, inputs: tuple[torch.Tensor, ...], expected: torch.Tensor, where: str | None) -> None:
    rig.assert_idle()
    assert rig.tier.table.free_slots + len(set(rig.tier.table)) == rig.tier.table.usable_slots
    found = rig.step(0, *inputs)
    assert torch.equal(found, expected), f"wrong after an interrupt at {where}"
    rig.assert_idle()


def test_a_step_may_be_interrupted_at_every_line(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=3, count=5, threads=2)
    inputs, others = rig.inputs(2, top_k=3), rig.inputs(1, top_k=3, seed=3)
    expected = rig.step(0, *inputs)
    places = set()
    line = 1
    while True:
        rig.step(1, *others)
        rig.tier.fetch([1], lambda _key: None)
        interrupt = Interrupt(line)
        if not interrupt.during(lambda: rig.step(0, *inputs)):
            break
        places.add(interrupt.raised_at)
        _settled_step(rig, inputs, expected, interrupt.raised_at)
        line += 1
    assert len(places) > 60


def test_fetching_may_be_interrupted_at_every_line(make_rig: MakeRig) -> None:
    rig = make_rig(slots=3, count=5, threads=2)
    inputs = rig.inputs(2, top_k=3)
    expected = rig.step(0, *inputs)
    line = 1
    while True:
        rig.tier.fetch([5, 6, 7], lambda _key: None)
        interrupt = Interrupt(line)
        if not interrupt.during(lambda: rig.tier.fetch([0, 5, 1], lambda _key: None)):
            break
        _settled_step(rig, inputs, expected, interrupt.raised_at)
        line += 1
    assert line > 60
