"""MoE layers with random experts in a store in memory, and what they compute in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from formats.bundle import BundleLayout
from offload.devices.host import HostDevice
from offload.moe.layer import ExpertsLayer
from offload.moe.step import moe_step
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import ReadEngine, ReadRequest
from prefetch.policies.base import CachePolicy
from prefetch.policies.lru import LruPolicy
from tests.tiers.readers import Bytes, MemoryReader

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error relative to the largest output: sums in fp32, and the rounding of hidden values to the dtype.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-3}

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gpt_oss_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate / (1 + (-1.702 * gate).exp())


def softcapped_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One that no kernel knows."""
    return 3 * torch.tanh(gate / 3) * up


class Experts(torch.nn.Module):
    """An experts module as the decorator of transformers leaves it, without parameters."""

    def __init__(self, gate: Gate, *, concatenated: bool = True) -> None:
        super().__init__()
        self.gate = gate
        self.is_concatenated = concatenated

    def _apply_gate(self, projected: torch.Tensor) -> torch.Tensor:
        if self.is_concatenated:
            return self.gate(*projected.chunk(2, dim=-1))
        return self.gate(projected[..., ::2], projected[..., 1::2])


class UngatedExperts(torch.nn.Module):
    def __init__(self, act_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act_fn = act_fn


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


@dataclass(frozen=True)
class Kind:
    """One way in which experts are made."""

    module: Callable[[], torch.nn.Module]
    activation: str | None
    gate: Any
    has_gate: bool = True
    has_bias: bool = False


KINDS = {
    "silu": Kind(lambda: Experts(lambda g, u: torch.nn.functional.silu(g) * u), "silu", lambda g, u: silu(g) * u),
    "gpt_oss": Kind(lambda: Experts(gpt_oss_gate, concatenated=False), "gpt_oss", gpt_oss_gate, has_bias=True),
    "no gate": Kind(
        lambda: UngatedExperts(lambda x: x.relu().square()), "relu2", lambda x: x.relu().square(), has_gate=False
    ),
    "unknown": Kind(lambda: Experts(softcapped_gate, concatenated=False), None, softcapped_gate, has_bias=True),
}


class Rig:
    """Layers that share one tier.

    Attributes:
        layers: experts of layer i have keys from i * count on.
        before_read: what every read calls first, with the expert's key.
    """

    def __init__(
        self,
        *,
        kind: str = "silu",
        format: str = "fp32",
        slots: int = 3,
        count: int = 6,
        hidden: int = 24,
        intermediate: int = 20,
        layers: int = 2,
        threads: int = 2,
        seed: int = 0,
        engine: Callable[..., Any] = ReadEngine,
        policy: Callable[[], CachePolicy] = LruPolicy,
        reader: Callable[[Bytes], MemoryReader] = MemoryReader,
    ) -> None:
        self.kind = KINDS[kind]
        self.dtype = DTYPES[format]
        self.count = count
        self.layout = BundleLayout(hidden, intermediate, format, self.kind.has_gate, self.kind.has_bias)
        generator = torch.Generator().manual_seed(seed)
        self.weights = [self._expert(generator) for _ in range(layers * count)]
        self.reader = reader(np.concatenate([self._bundle(expert) for expert in self.weights]))
        self.reader.before_read = lambda offset, _nbytes: self.before_read(offset // self.layout.nbytes)
        self.before_read: Callable[[int], None] = lambda _key: None
        self.engine = engine(self.reader.as_shard_reader(), threads=threads, chunk_nbytes=4096)
        self.device = HostDevice()
        arena = Arena(self.device, self.layout.nbytes, slots)
        for slot in range(slots):
            # All bits set is a NaN in every format.
            arena.view(slot, self.layout.nbytes)[:] = 0xFF
        self.tier = ExpertTier(arena, policy(), self.engine, self._locate, lambda _key: self.layout.nbytes)
        self.layers = [
            ExpertsLayer(
                f"layers.{index}.experts", index * count, count, self.layout, self.dtype, self.kind.module(),
                self.kind.activation,
            )
            for index in range(layers)
        ]  # fmt: skip

    def break_reads(self, after: int, error: BaseException) -> None:
        """All reads but the first so many fail."""
        left = after

        def fail(_key: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise error

        self.before_read = fail

    def _expert(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        weights = {}
        for name, component in self.layout.components.items():
            scale = 1.5 / math.sqrt(component.shape[-1]) if len(component.shape) == 2 else 0.5
            weights[name] = (scale * torch.randn(component.shape, generator=generator)).to(self.dtype)
        return weights

    def _bundle(self, weights: dict[str, torch.Tensor]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        bundle = np.zeros(self.layout.nbytes, np.uint8)
        for name, component in self.layout.components.items():
            raw = weights[name].contiguous().view(torch.uint8).numpy().reshape(-1)
            bundle[component.offset : component.offset + component.nbytes] = raw
        return bundle

    def _locate(self, key: int, out: memoryview) -> ReadRequest:
        return self.reader.request(key * self.layout.nbytes, np.frombuffer(out, np.uint8))

    def inputs(self, tokens: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, experts (no expert twice for a token) and weights."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, self.layout.hidden, generator=generator).to(self.dtype)
        scores = torch.rand(tokens, self.count, generator=generator)
        weights, index = scores.topk(top_k, dim=-1)
        return hidden, index, weights.to(self.dtype)

    def step(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        with torch.no_grad():
            return moe_step(self.layers[layer], self.tier, self.device, hidden, index, weights, **options)

    def reference(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64 [T, H], pair by pair."""
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for token in range(hidden.shape[0]):
            for place in range(index.shape[1]):
                expert, weight = int(index[token, place]), float(weights[token, place])
                if 0 <= expert < self.count and weight != 0:
                    out[token] += weight * self._expert_output(layer * self.count + expert, hidden[token].double())
        return out

    def _expert_output(self, key: int, x: torch.Tensor) -> torch.Tensor:
        weights = {name: tensor.double() for name, tensor in self.weights[key].items()}

        def project(name: str, x: torch.Tensor) -> torch.Tensor:
            projected = weights[name] @ x
            return projected + weights[f"{name}_bias"] if self.kind.has_bias else projected

        up = project("up", x)
        return project("down", self.kind.gate(project("gate", x), up) if self.kind.has_gate else self.kind.gate(up))

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.dtype is self.dtype
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        if found.numel():
            worst = (found.double() - expected).abs().max().item()
            bound = TOLERANCE[self.layout.format] * max(expected.abs().max().item(), 1e-3)
            assert worst <= bound, f"off by {worst:.3g}, allowed {bound:.3g}"

    def assert_idle(self) -> None:
        """Nothing is in use or being read."""
        self.tier.check()
        assert not self.tier.table.pinned
        assert not self.engine._queue.unfinished
        assert self.reader.reading == 0

    def close(self) -> None:
        self.engine.close()
