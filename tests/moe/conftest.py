from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.moe.rig import Rig


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out unwritten is full of NaN."""
    empty = torch.empty
    # torch lists the functions that a default device applies to at the first use of one: not with ours among them.
    with torch.device("meta"):
        torch.zeros(1)

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(params=["pairs", "ordered"])
def accumulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of summing, whatever the sizes."""
    nbytes = {"pairs": 1 << 40, "ordered": -1}[request.param]
    monkeypatch.setattr("offload.moe.accumulate.kept_nbytes", lambda **_: nbytes)
    return str(request.param)
