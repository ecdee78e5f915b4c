"""Machines and models with layers, made up."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from formats.bundle import BundleLayout
from placement.curves import roofline
from placement.disk import Disk, DiskPoint, Overlap
from placement.hardware_profile import (
    AttentionSpeed,
    Compute,
    FormatCurve,
    HardwareProfile,
    Link,
    Overheads,
    Provenance,
)
from placement.model_spec import ExpertsSpec, LayerSpec, LinearSpec, ModelSpec
from tests.placement.specs import spec

FORMATS = ("bf16", "int4")


def model(
    layers: int = 3, experts: int = 8, top_k: int = 2, hidden: int = 256, intermediate: int = 128, **changed: Any
) -> ModelSpec:
    """A model of `layers` decoder layers, the first of them dense where `dense_layers` says so."""
    dense_layers = changed.pop("dense_layers", 0)
    format = changed.pop("format", "bf16")
    linears = (LinearSpec(4 * hidden, hidden, "bf16"), LinearSpec(hidden, hidden, "bf16", 2))
    nbytes = sum(one.nbytes for one in linears)
    moe = [
        ExpertsSpec(f"layers.{i}.experts", experts, top_k, BundleLayout(hidden, intermediate, format))
        for i in range(dense_layers, layers)
    ]
    decoder = tuple(
        LayerSpec(nbytes, linears, 1024, 2 * hidden, None, i - dense_layers if i >= dense_layers else None)
        for i in range(layers)
    )
    head = LinearSpec(1000, hidden, "bf16")
    sizes = {
        "hidden_size": hidden,
        "layer_count": layers,
        "dense_nbytes": layers * nbytes + 2 * head.nbytes,
        "kv_nbytes_per_token": 1024 * layers,
        "experts": tuple(moe),
        "layers": decoder,
        "head": head,
    }
    return spec(**{**sizes, **changed})


def machine(
    *,
    ram: float = 20e9,
    vram: float = 500e9,
    link: float = 10e9,
    disk: float = 2e9,
    gpu: bool = True,
    cpu_flops: float = 1e11,
    step: float = 0.0,
    reading: float = 1.0,
    resident: Overlap | None = None,
) -> HardwareProfile:
    """A machine by its bandwidths in bytes per second; `step` seconds go into looking for experts.

    While it reads, kernels have the share `reading` of their speed; those of experts that were in RAM in a prompt, and
    reads beside them, those of `resident`.
    """

    def compute(bytes_per_s: float, flops_per_s: float, call_s: float) -> Compute:
        curves = tuple(
            FormatCurve(name, roofline(bits, bytes_per_s, flops_per_s, call_s))
            for name, bits in zip(FORMATS, (16, 4.5), strict=True)
        )
        attention = AttentionSpeed(call_s, bytes_per_s, flops_per_s, flops_per_s)
        return Compute(1 << 35, bytes_per_s, curves, curves, attention, Overheads(1e-3, 10 * call_s, 1e-11, step))

    copies = Link(1e-5, link, 0.7 * link) if gpu else None
    points = tuple(
        DiskPoint(block, depth, disk * min(1.0, depth / 4 * block / (1 << 20)))
        for block in (1 << 16, 1 << 20)
        for depth in (1, 2, 4)
    )
    return HardwareProfile(
        "made up",
        compute(ram, cpu_flops, 1e-5),
        compute(vram, 100 * cpu_flops, 5e-6) if gpu else None,
        copies,
        copies,
        1 << 34 if gpu else 0,
        Disk(points, (), 1e-4, Overlap(1, 0.9, reading), Overlap(32, 0.9, reading), 1 << 40, resident=resident),
        Provenance("measured", "made up", "none", "2026-01-01"),
    )


speeds = st.floats(1e8, 1e12)
machines = st.builds(
    machine,
    ram=speeds,
    vram=speeds,
    link=speeds,
    disk=speeds,
    gpu=st.booleans(),
    step=st.sampled_from([0.0, 1e-3]),
    reading=st.floats(0.1, 1),
    resident=st.sampled_from([None, Overlap(32, 0.6, 0.9, 1e9), Overlap(32, 0.3, 0.7)]),
)
