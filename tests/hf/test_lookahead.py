"""What later routers say of a hidden state: the same by call and by tape, whatever form routers have."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from offload.hf import lookahead
from offload.hf.lookahead import find_routers
from prefetch.policies.geometry import Geometry
from prefetch.predictors.predictor import Predictor
from tests.conftest import TinyCheckpoint


class Notes:
    """A prefetcher that asks at once."""

    def __init__(self, geometry: Geometry) -> None:
        self.on, self.lock, self.predictor = True, threading.RLock(), Predictor(geometry)
        self.found: list[tuple[int, list[int], Any]] = []

    def note_router(self, layer: int, active: Any, ask: Any) -> None:
        self.found.append((layer, active.tolist(), ask().copy()))


class Scaled(torch.nn.Module):
    """A router that is not a product with its weight."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.router = router.weight, router

    def forward(self, hidden: torch.Tensor) -> Any:
        logits, weights, ids = self.router(hidden)
        return 3 * logits.tanh(), weights, ids


@pytest.mark.parametrize("product", [True, False])
def test_a_tape_is_told_what_a_call_is(tiny_checkpoint: TinyCheckpoint, store_root: Path, product: bool) -> None:
    model = offload.load(tiny_checkpoint("qwen3_moe"), ram="1GiB", nvme=store_root, context=80)
    with model.offload as runtime, torch.no_grad():
        routers: Any = find_routers(model, runtime.layers)
        if not product:
            routers = [Scaled(router) for router in routers]
        geometry = Geometry(tuple(layer.count for layer in runtime.layers))
        notes: Any = Notes(geometry)
        for index, router in enumerate(routers):
            hook = lookahead._Hook(index, routers, runtime.layers, notes)
            assert (hook._products is not None) == product
            for seed in range(3):
                generator = torch.Generator().manual_seed(seed)
                hidden = torch.randn(1, model.config.hidden_size, generator=generator).to(model.dtype)
                output = router(hidden)
                hook(router, (hidden,), output)
                hook.routed(router, hidden, *output)
                (layer, active, said), taped = notes.found[-2:]
                assert (layer, active) == taped[:2] == (index, output[2][0].tolist())
                for lines in (said, taped[2]):
                    following = routers[index + 1 : index + 1 + notes.predictor.depth]
                    assert len(lines) == 1 + len(following)
                    for logits, other in zip(lines, [router, *following], strict=True):
                        exact = other(hidden)[0][0].float().numpy()
                        assert np.allclose(logits, exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


def test_of_several_tokens_nothing_is_said(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    model = offload.load(tiny_checkpoint("qwen3_moe"), ram="1GiB", nvme=store_root, context=80)
    with model.offload as runtime, torch.no_grad():
        routers: Any = find_routers(model, runtime.layers)
        notes: Any = Notes(Geometry(tuple(layer.count for layer in runtime.layers)))
        hook = lookahead._Hook(0, routers, runtime.layers, notes)
        hidden = torch.randn(2, model.config.hidden_size).to(model.dtype)
        output = routers[0](hidden)
        hook(routers[0], (hidden,), output)
        hook.routed(routers[0], hidden, *output)
        notes.on = False
        hook.routed(routers[0], hidden[:1], *(part[:1] for part in output))
        assert not notes.found
