"""Models and a machine as HybriMoE's evaluation has them (arXiv 2504.05897, section 5), by stated figures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefetch.scheduler.records import LayerCosts
from prefetch.traces.synthetic import SyntheticRouting

BYTES_PER_PARAMETER = 0.5625
"""4 bits, and a 16-bit scale for 32 of them."""

GPU_BYTES_PER_S = 0.6e12
GPU_FLOPS = 60e12
GPU_LAUNCH_S = 10e-6
"""RTX A6000: 768 GB/s and 155 dense bf16 Tflop/s nominally, less what kernels leave."""

LINK_BYTES_PER_S = 25e9
LINK_LATENCY_S = 10e-6
"""PCIe 4.0 x16: 31.5 GB/s nominally."""

CPU_BYTES_PER_S = 50e9
CPU_FLOPS = 0.5e12
CPU_FIRST_S = 50e-6
"""10 cores of a Xeon Gold 5220R: six channels of DDR4-2666 are 128 GB/s nominally, for 24 cores."""

DENSE_OVERHEAD_S = 150e-6
"""Launches and small kernels of a layer outside its experts."""


@dataclass(frozen=True)
class Model:
    """One model's MoE layers.

    Attributes:
        name: that the table has.
        layers, experts, top_k: of its MoE layers.
        expert_parameters: of one routed expert.
        dense_parameters: of a layer outside routed experts, shared ones included; on the GPU.
        skew, locality: of the synthetic routing, such that LRU with a quarter of the experts hits about as often as
            HybriMoE reports: 30%, 45% and 48% for the three models.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_parameters: float
    dense_parameters: float
    skew: float
    locality: float

    @property
    def routing(self) -> SyntheticRouting:
        """What stands for its router."""
        return SyntheticRouting(self.layers, self.experts, self.top_k, skew=self.skew, locality=self.locality)

    def dense_s(self, tokens: int) -> float:
        """Seconds of a layer on the GPU outside its routed experts."""
        reading_s = BYTES_PER_PARAMETER * self.dense_parameters / GPU_BYTES_PER_S
        return DENSE_OVERHEAD_S + max(reading_s, 2 * self.dense_parameters * tokens / GPU_FLOPS)

    @property
    def costs(self) -> LayerCosts:
        """Seconds of its experts on this machine."""
        nbytes, flops = BYTES_PER_PARAMETER * self.expert_parameters, 2 * self.expert_parameters
        return LayerCosts(
            cpu_token_s=flops / CPU_FLOPS,
            cpu_expert_s=nbytes / CPU_BYTES_PER_S,
            cpu_first_s=CPU_FIRST_S,
            gpu_expert_s=nbytes / GPU_BYTES_PER_S + GPU_LAUNCH_S,
            gpu_token_s=flops / GPU_FLOPS,
            link_expert_s=nbytes / LINK_BYTES_PER_S + LINK_LATENCY_S,
        )


MODELS = (
    Model("Mixtral-8x7B", 32, 8, 2, 3 * 4096 * 14336, 42e6, skew=0.1, locality=0.1),
    Model("Qwen2-57B-A14B", 28, 64, 8, 3 * 3584 * 2560, 33e6 + 3 * 3584 * 20480, skew=0.4, locality=1.1),
    Model("DeepSeek-V2-Lite", 26, 64, 6, 3 * 2048 * 1408, 14e6 + 2 * 3 * 2048 * 1408, skew=0.6, locality=1.0),
)


def scaled_down(model: Model, layers: int) -> Model:
    """The same experts in fewer layers: seconds of a layer stay what they are."""
    return replace(model, layers=layers)
