"""Tiles are those that are fastest, are timed once for a card, and are what experts are computed with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from formats.bundle import BundleLayout
from gpu_kernels import tiles
from gpu_kernels.configs import ProductConfig
from gpu_kernels.expert_mlp import default_config
from gpu_kernels.tiles import Kind, choose, chosen
from offload.devices import cuda_tiles
from offload.devices.cuda_tiles import TileTimer, choose_tiles, kinds_of, tune
from offload.errors import SlowDeviceWarning
from offload.measuring.kernels import Gate
from offload.moe.layer import ExpertsLayer
from tests.devices.fake_cuda import FakeCudaDriver

DEVICE = torch.device("cpu")
LAYOUT = BundleLayout(32, 32, "bf16")
FEW, MANY = Kind(LAYOUT, 2, few=True), Kind(LAYOUT, 2, few=False)
ONE = Kind(BundleLayout(32, 32, "mxfp4"), 2, few=False)


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    with patch.dict(tiles._chosen, clear=True):
        yield


class Clock:
    """Seconds by place among the candidates; the first takes 1."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[tuple[Kind, ProductConfig]] = []

    def __call__(self, kind: Kind, config: ProductConfig) -> float:
        self.asked.append((kind, config))
        return self.seconds[kind.candidates.index(config)]


@pytest.mark.parametrize(
    ("seconds", "place"),
    [((1.0, 0.5, 0.7), 1), ((1.0, 0.7, 0.5), 2), ((1.0, 2.0, 2.0), 0), ((1.0, 0.97, 1.0), 0)],
)
def test_the_fastest_is_taken_if_it_gains_enough(seconds: tuple[float, ...], place: int) -> None:
    choose_tiles(DEVICE, [FEW], Clock(*seconds), None)
    assert chosen(DEVICE, FEW) == FEW.candidates[place]
    assert chosen(torch.device("meta"), FEW) == FEW.candidates[0], "of this device alone"
    assert chosen(DEVICE, MANY) == MANY.candidates[0]
    x, ids = torch.zeros(1, 32, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int64)
    assert default_config(x, ids, LAYOUT) == FEW.candidates[place]


def test_a_card_is_timed_once(tmp_path: Path) -> None:
    file = tmp_path / "tiles" / "card.json"
    choose_tiles(DEVICE, [FEW, ONE], Clock(1.0, 2.0, 0.5), file)
    tiles._chosen.clear()
    again = Clock(1.0, 0.5, 0.7)
    choose_tiles(DEVICE, [FEW, ONE], again, file)
    assert not again.asked
    assert chosen(DEVICE, FEW) == FEW.candidates[2]
    choose_tiles(DEVICE, [FEW, MANY], again, file)
    assert {kind for kind, _ in again.asked} == {MANY}
    assert chosen(DEVICE, MANY) == MANY.candidates[1]
    assert len(json.loads(file.read_text())) == 3


def test_one_candidate_is_not_timed() -> None:
    clock = Clock(1.0)
    choose_tiles(DEVICE, [ONE], clock, None)
    assert not clock.asked


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 3}', "{}", "not json"])
def test_a_file_that_says_nothing_is_written_anew(content: str, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(content)
    choose_tiles(DEVICE, [FEW], Clock(1.0, 0.5, 0.7), file)
    assert chosen(DEVICE, FEW) == FEW.candidates[1]
    assert json.loads(file.read_text()) == {repr(FEW): repr(FEW.candidates[1])}


def test_tiles_of_other_kernels_are_timed_anew(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps({repr(FEW): "ProductConfig(tokens=1)"}))
    choose_tiles(DEVICE, [FEW], Clock(1.0, 0.5, 0.7), file)
    assert chosen(DEVICE, FEW) == FEW.candidates[1]
    assert json.loads(file.read_text()) == {repr(FEW): repr(FEW.candidates[1])}


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tiles").write_text("a file")
    choose_tiles(DEVICE, [FEW], Clock(1.0, 0.5, 0.7), tmp_path / "tiles" / "card.json")
    assert chosen(DEVICE, FEW) == FEW.candidates[1]


def test_what_is_no_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        choose(DEVICE, FEW, MANY.candidates[0])


def layers(format: str = "bf16") -> list[ExpertsLayer]:
    layout = BundleLayout(32, 32, format)
    return [ExpertsLayer(f"layer {i}", 4 * i, 4, layout, torch.bfloat16, Gate(), "silu") for i in range(2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake's memory is the host's")
def test_steps_are_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "_MANY_TOKENS", 65)
    monkeypatch.setattr(cuda_tiles, "_TURNS", 2)
    monkeypatch.setattr(cuda_tiles, "_REPLAYS", 1)
    driver = FakeCudaDriver()
    # Less than was asked for, until there is room.
    driver.refuse = 3
    assert kinds_of(layers()) == [FEW, MANY]
    ran: list[tuple[int, ProductConfig]] = []
    run = cuda_tiles.expert_mlp

    def noted(x: torch.Tensor, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        ran.append((len(x), rest[-1]))  # type: ignore[arg-type]
        assert ids.shape == (len(x), 2)
        return run(x, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_tiles, "expert_mlp", noted)
    timer = TileTimer(driver, layers(), 2)
    for kind, tokens in ((FEW, 1), (MANY, 65)):
        ran.clear()
        assert timer(kind, kind.candidates[1]) > 0
        assert set(ran) == {(tokens, kind.candidates[1])}


def test_no_memory_to_time_is_said(tmp_path: Path) -> None:
    driver = FakeCudaDriver()
    driver.refuse = 1000
    with pytest.warns(SlowDeviceWarning, match="could not be timed .*first guesses"):
        tune(driver, layers(), 2, tmp_path)
    assert chosen(DEVICE, FEW) == FEW.candidates[0]
    assert not [*tmp_path.iterdir()]
