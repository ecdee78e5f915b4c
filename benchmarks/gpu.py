"""A GPU: its kernels beside what its memory and torch's products reach, copies, replayed steps, and whole models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import gpu_kv, gpu_models, replayed_steps
from benchmarks.checkpoints import Shape, store_root
from benchmarks.gpu_copies import copy_table
from benchmarks.gpu_doorbell import doorbell_table
from benchmarks.gpu_products import ExpertProducts, TorchSeconds, torch_seconds
from benchmarks.gpu_timing import accelerator, replayed, seconds_of
from benchmarks.harness import Report, Row, Spread, say
from formats.bundle import BundleLayout
from formats.pack import pack_matrix
from gpu_kernels.combine import combine
from gpu_kernels.configs import ProductConfig
from gpu_kernels.expert_mlp import expert_mlp
from gpu_kernels.expert_mlp_reference import expert_mlp_reference
from gpu_kernels.launch import DTYPE_OF_FORMAT, interpreting
from gpu_kernels.tiles import chosen
from offload.devices.cuda import CudaDevice
from offload.devices.cuda_driver import open_cuda
from offload.devices.cuda_tiles import TileTimer, choose_tiles, kinds_of
from offload.machine_profile import measure_profile
from offload.measuring.kernels import Gate
from offload.moe.layer import ExpertsLayer

NOT_MEASURED = "no CUDA device here: not measured"
_TOLERANCE = 2.0**-7
_BANDWIDTH_SHARE = 0.8
_PRODUCT_SHARE = 0.6
_NO_BOUND = 1 << 60
"""Of slabs for copies: the card's memory is one."""


@dataclass(frozen=True)
class GpuScale:
    """How much is measured.

    Attributes:
        formats: of the experts.
        hidden: H.
        intermediate: I.
        experts: of the layer, all in VRAM; more than the card's L2 holds.
        top_k: of a token.
        few_tokens: numbers of tokens at which bandwidth counts.
        many_tokens: numbers of tokens at which arithmetic counts.
        copy_nbytes: of one copy over the link, and of the buffer that memory bandwidth is measured with.
        rounds: repeats.
        models: whole models over three tiers.
        kv: attention to blocks of a KV cache.
        narrow: a model with next to nothing to compute, whose replayed steps show what the host takes.
        steps: of them.
    """

    formats: tuple[str, ...]
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    few_tokens: tuple[int, ...]
    many_tokens: tuple[int, ...]
    copy_nbytes: int
    rounds: int
    models: gpu_models.ModelScale
    kv: gpu_kv.KvScale
    narrow: Shape
    steps: replayed_steps.ReplayScale


_FORMATS = ("bf16", "int8", "int4", "mxfp4", "fp8_e4m3")
FULL = GpuScale(
    _FORMATS, 2048, 768, 128, 8, (1, 2, 4, 8), (512, 2048), 1 << 30, 20, gpu_models.FULL, gpu_kv.FULL,
    replayed_steps.NARROW, replayed_steps.FULL,
)  # fmt: skip
QUICK = GpuScale(
    ("bf16", "int4"), 64, 48, 4, 2, (1,), (70,), 1 << 16, 2, gpu_models.QUICK, gpu_kv.QUICK,
    replace(gpu_models.TINY, dtype="float32"), replayed_steps.QUICK,
)  # fmt: skip


PARTS = ("kernels", "steps", "models")


def run(work: Path, scale: GpuScale, parts: tuple[str, ...] = PARTS) -> Report:
    """Gate on float64, then time; in Triton's interpreter it runs too, and its figures mean nothing.

    Args:
        work: for checkpoints and stores.
        scale: how much.
        parts: of PARTS.

    Raises:
        GateError: an expert's output is not that of the reference.
    """
    report = Report("gpu" if parts == PARTS else f"gpu_{'_'.join(parts)}")
    if not torch.cuda.is_available() and not interpreting():
        report.notes.append(NOT_MEASURED)
        return report
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        report.notes.append(f"{torch.cuda.get_device_name(device)}; random weights")
    if "kernels" in parts:
        _kernels(report, scale, device)
    if "steps" in parts:
        report.tables["Requests of a replayed step to the CPU"] = doorbell_table(report, device, scale.rounds)
        replayed_steps.step_tables(report, work, scale.narrow, scale.steps)
    if "models" in parts:
        profile = None
        if device.type == "cuda":
            # What `offload profile` measures, the GPU and its link among it.
            profile, _ = measure_profile(store_root(work), quick=False, say=say)
        report.tables["Models"] = gpu_models.model_table(report, scale.models, accelerator(), work, profile)
    return report


def _kernels(report: Report, scale: GpuScale, device: torch.device) -> None:
    """Experts, attention to KV blocks and copies, every expert equally likely."""
    bandwidth = _memory_bandwidth(scale, device)
    layers = {format: _Layer(format, scale, device) for format in scale.formats}
    for layer in layers.values():
        layer.gate(report)
    report.tables["Experts, few tokens"] = [
        _few(report, layer, tokens, bandwidth, scale) for layer in layers.values() for tokens in scale.few_tokens
    ]
    torchs: dict[int, TorchSeconds] = {}
    report.tables["Experts, many tokens"] = [
        _many(report, layer, tokens, bandwidth, torchs, scale)
        for layer in layers.values()
        for tokens in scale.many_tokens
    ]
    report.tables["Attention to KV blocks, one new token"] = gpu_kv.kv_table(
        report, scale.kv, device, bandwidth.median, scale.rounds
    )
    if device.type == "cuda":
        copier = CudaDevice(open_cuda(accelerator()), _NO_BOUND)
        report.tables["Copies from pinned memory"] = copy_table(report, copier, scale.copy_nbytes, scale.rounds)


class _Layer:
    """The experts of one layer in one format, in slots of one slab; all are copies of a few."""

    def __init__(self, format: str, scale: GpuScale, device: torch.device) -> None:
        say(f"packing experts in {format}")
        self.scale = scale
        self.device = device
        self.layout = BundleLayout(scale.hidden, scale.intermediate, format)
        self.dtype = DTYPE_OF_FORMAT.get(format, torch.bfloat16)
        self.bundles = [_bundle(self.layout, seed) for seed in range(2)]
        self.slab = torch.empty(scale.experts, self.layout.nbytes, dtype=torch.uint8, device=device)
        for expert in range(scale.experts):
            self.slab[expert] = torch.from_numpy(self.bundles[expert % 2])
        self.tiles: dict[bool, ProductConfig] = {}
        if device.type == "cuda":
            # As when a model is loaded.
            driver = open_cuda(accelerator())
            layer = ExpertsLayer("experts", 0, scale.experts, self.layout, self.dtype, Gate(), "silu")
            kinds = kinds_of([layer])
            choose_tiles(driver.device, kinds, TileTimer(driver, [layer], scale.top_k), None)
            self.tiles = {kind.few: chosen(driver.device, kind) for kind in kinds}
        places = self.slab.data_ptr() + torch.arange(scale.experts) * self.layout.nbytes
        self.table = places.to(device)

    def inputs(self, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, experts and weights."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.scale.hidden, generator=generator).to(self.dtype)
        scores = torch.rand(tokens, self.scale.experts, generator=generator)
        weights, ids = scores.topk(self.scale.top_k, -1)
        return x.to(self.device), ids.contiguous().to(self.device), weights.contiguous().to(self.device)

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What one MoE layer's experts give."""
        rows = expert_mlp(x, ids, self.table, self.layout, "silu")
        return combine(rows, weights, torch.empty_like(x))

    def gate(self, report: Report) -> None:
        """Compare with float64."""
        for tokens in (self.scale.few_tokens[0], self.scale.many_tokens[0]):
            x, ids, weights = self.inputs(tokens, seed=tokens)
            found = self.run(x, ids, weights).double().cpu()
            expected = torch.zeros_like(found)
            for place in range(self.scale.top_k):
                for parity, bundle in enumerate(self.bundles):
                    chosen = (ids[:, place] % 2 == parity).cpu()
                    output = expert_mlp_reference(bundle, self.layout, x.cpu()[chosen], "silu", rounded=False)
                    expected[chosen] += weights.cpu()[chosen, place, None].double() * output
            error = float((found - expected).abs().max() / expected.abs().max())
            report.gate(
                f"{self.layout.format}, {tokens} tokens", error <= _TOLERANCE,
                f"largest error {error:.2g} of the largest output, at most {_TOLERANCE:.2g}",
            )  # fmt: skip


def _bundle(layout: BundleLayout, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    random = np.random.default_rng(seed)
    bundle = np.zeros(layout.nbytes, np.uint8)
    for name in ("gate", "up", "down"):
        rows, columns = layout.shape(name)
        weights = (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        parts = {name: torch.from_numpy(weights).to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1)}
        if layout.is_packed:
            parts[name], parts[f"{name}_scale"] = pack_matrix(weights, layout.format)
        for part, payload in parts.items():
            place = layout.components[part]
            bundle[place.offset : place.offset + place.nbytes] = payload
    return bundle


def _memory_bandwidth(scale: GpuScale, device: torch.device) -> Spread:
    """Bytes per second that a copy within the memory reads and writes."""
    source = torch.zeros(scale.copy_nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda _: target.copy_(source), device, scale.rounds)
    values = [2 * scale.copy_nbytes / value for value in (seconds.median, seconds.minimum, seconds.maximum)]
    return Spread(values[0], values[2], values[1], seconds.repeats)


def _few(report: Report, layer: _Layer, tokens: int, bandwidth: Spread, scale: GpuScale) -> Row:
    """Eight steps with different experts in one graph, so that weights come from memory and not from L2."""
    turns = [layer.inputs(tokens, seed=100 + turn) for turn in range(8)]
    seconds = seconds_of(replayed(lambda turn: layer.run(*turns[turn]), layer.device, 8), layer.device, scale.rounds)
    nbytes = sum(len(ids.unique()) for _, ids, _ in turns) * layer.layout.nbytes
    share = nbytes / seconds.median / bandwidth.median
    report.target(f"{layer.layout.format}, {tokens} tokens: share of bandwidth", share, "at least", _BANDWIDTH_SHARE)
    return {
        "format": layer.layout.format,
        "tokens": tokens,
        "tiles": str(layer.tiles.get(True, "")),
        "us_per_step": seconds.median / 8 * 1e6,
        "GB_per_s": nbytes / seconds.median / 1e9,
        "share_of_bandwidth": share,
    }


def _many(
    report: Report, layer: _Layer, tokens: int, bandwidth: Spread, torchs: dict[int, TorchSeconds], scale: GpuScale
) -> Row:
    """Beside what torch's products take on the same shapes, which the target is a share of, and other bounds."""
    x, ids, weights = layer.inputs(tokens, seed=7)
    counts = ids.flatten().bincount(minlength=scale.experts).tolist()
    products = ExpertProducts(scale.hidden, scale.intermediate, tuple(counts))
    if tokens not in torchs:
        torchs[tokens] = torch_seconds(products, layer.device, scale.rounds)
        if torchs[tokens].why_not_grouped:
            report.notes.append(f"torch's grouped products, {tokens} tokens: {torchs[tokens].why_not_grouped}")
    other = torchs[tokens]

    def step(_: int) -> torch.Tensor:
        return layer.run(x, ids, weights)

    seconds = seconds_of(replayed(step, layer.device, 1), layer.device, scale.rounds).median
    started_s = seconds_of(step, layer.device, scale.rounds).median
    bound_s = products.memory_bound_s(layer.layout.nbytes, bandwidth.median)

    def rate(value: float) -> float:
        return products.flops / value / 1e12

    share = other.by_expert / seconds
    report.target(
        f"{layer.layout.format}, {tokens} tokens: share of torch's bf16 rate on the same shapes", share, "at least",
        _PRODUCT_SHARE,
    )  # fmt: skip
    row: Row = {
        "format": layer.layout.format,
        "tokens": tokens,
        "tiles": str(layer.tiles.get(False, "")),
        "tokens_of_an_expert": sum(counts) / products.experts,
        "ms": seconds * 1e3,
        "ms_from_python": started_s * 1e3,
        "TFLOP_per_s": rate(seconds),
        "share_of_torch_same_shapes": share,
        "share_of_memory_bound": bound_s / seconds,
        "TFLOP_per_s_memory_bound": rate(bound_s),
        "TFLOP_per_s_torch_by_expert": rate(other.by_expert),
        "TFLOP_per_s_torch_by_expert_from_python": rate(other.by_expert_from_python),
        "TFLOP_per_s_torch_one_product": rate(other.one_product),
    }
    if other.grouped is not None:
        row["TFLOP_per_s_torch_grouped"] = rate(other.grouped)
    return row
