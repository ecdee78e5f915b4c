"""Tile sizes of experts on this card: candidates are timed when sizes are new to it, and the choice is kept."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import triton

from gpu_kernels.configs import ProductConfig
from gpu_kernels.expert_mlp import expert_mlp
from gpu_kernels.tiles import Kind, choose
from offload.devices.cuda_driver import CudaDriver
from offload.errors import CaptureError, DeviceError, SlowDeviceWarning
from offload.moe.layer import ExpertsLayer
from profiler.cache import write_whole

_LEAST_GAIN = 0.05
"""Another than the first candidate is taken only if it is faster by this share: timings scatter."""

_WEIGHTS_NBYTES = 192 << 20
"""Weights that are taken in turn, as far as there is room: more than a consumer card's L2 holds."""

_MANY_TOKENS = 512
_TURNS, _REPLAYS = 8, 5

_MOST_TOP_K = 8
"""Experts of a token in what is timed, at most."""

Seconds = Callable[[Kind, ProductConfig], float]


def tune(driver: CudaDriver, layers: Sequence[ExpertsLayer], most_pairs: int, directory: Path) -> None:
    """Choose the tiles of a model's experts; where that finds no memory, those of the first candidates, and say so.

    Args:
        driver: of the device.
        layers: of the model.
        most_pairs: of a decode step.
        directory: of what is kept.
    """
    timer = TileTimer(driver, layers, min(most_pairs, _MOST_TOP_K))
    try:
        choose_tiles(driver.device, kinds_of(layers), timer, _file(directory, driver.describe()))
    except (torch.OutOfMemoryError, CaptureError, DeviceError) as error:
        warnings.warn(
            f"tile sizes of experts on {driver.device} could not be timed ({error}): first guesses are taken",
            SlowDeviceWarning,
            stacklevel=2,
        )


def choose_tiles(device: torch.device, kinds: Sequence[Kind], seconds: Seconds, file: Path | None) -> None:
    """Take for each kind what the file says, or what is fastest, which is then written there.

    Args:
        device: for which.
        kinds: each once.
        seconds: times a candidate.
        file: of this card and this version of the kernels; None to keep nothing. One that cannot be written is not:
            the next load times again.
    """
    kept = {} if file is None else _read(file)
    known = len(kept)
    for kind in kinds:
        names = [repr(config) for config in kind.candidates]
        if kept.get(repr(kind)) not in names:
            kept[repr(kind)] = repr(_fastest(kind, seconds))
            known = -1
        choose(device, kind, kind.candidates[names.index(kept[repr(kind)])])
    if file is not None and known != len(kept):
        with contextlib.suppress(OSError):
            write_whole(file, json.dumps(kept, indent=1))


def _fastest(kind: Kind, seconds: Seconds) -> ProductConfig:
    first, *others = kind.candidates
    if not others:
        return first
    best, least = first, seconds(kind, first) * (1 - _LEAST_GAIN)
    for config in others:
        took = seconds(kind, config)
        if took < least:
            best, least = config, took
    return best


def _file(directory: Path, card: str) -> Path:
    """Where the choices of a card lie."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{card}-triton-{triton.__version__}")
    return directory / f"{name}.json"


def kinds_of(layers: Sequence[ExpertsLayer]) -> list[Kind]:
    """Those of a model's layers, few pairs and many, each once."""
    found = [Kind(layer.layout, layer.dtype.itemsize, few) for layer in layers for few in (True, False)]
    return list(dict.fromkeys(found))


class TileTimer:
    """Seconds of one layer's experts on zeros, in a graph: starting kernels takes longer than few tokens do."""

    def __init__(self, driver: CudaDriver, layers: Sequence[ExpertsLayer], top_k: int) -> None:
        """Time steps of such layers, with so many experts of a token."""
        self._driver = driver
        self._layers = {(layer.layout, layer.dtype.itemsize): layer for layer in layers}
        self._top_k = top_k

    def __call__(self, kind: Kind, config: ProductConfig) -> float:
        """Of a step.

        Raises:
            torch.OutOfMemoryError: no room for one expert.
        """
        layer = self._layers[kind.layout, kind.itemsize]
        nbytes, experts, top_k = kind.layout.nbytes, layer.count, min(self._top_k, layer.count)
        weights = self._weights(nbytes, _TURNS * experts)
        device = self._driver.device
        bundles = torch.arange(_TURNS * experts, device=device).view(_TURNS, experts) % (len(weights) // nbytes)
        tables = weights.data_ptr() + bundles * nbytes
        tokens = 1 if kind.few else _MANY_TOKENS
        x = torch.zeros(tokens, kind.layout.hidden, dtype=layer.dtype, device=device)
        ids = (torch.arange(_TURNS * tokens * top_k, device=device) % experts).view(_TURNS, tokens, top_k)
        activation = layer.activation or "silu"
        graph = self._driver.step_graph()

        def run(turn: int) -> None:
            expert_mlp(x, ids[turn], tables[turn], kind.layout, activation, config)

        def step() -> None:
            for turn in range(_TURNS):
                graph.call(partial(run, turn))

        graph.run(step)
        graph.capture(step)
        times = []
        for _ in range(_REPLAYS):
            before = perf_counter()
            graph.replay()
            times.append(perf_counter() - before)
        return min(times)

    def _weights(self, expert_nbytes: int, most: int) -> torch.Tensor:
        """So many experts at most, fewer where there is no room."""
        count = max(1, min(most, _WEIGHTS_NBYTES // expert_nbytes))
        while True:
            try:
                return self._driver.allocate(count * expert_nbytes).zero_()
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                count //= 2


def _read(file: Path) -> dict[str, str]:
    """What is kept; nothing where there is no file, or one that is none of ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}
