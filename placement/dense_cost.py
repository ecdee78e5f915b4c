"""Seconds of what is not routed experts: linear layers, attention, overheads."""

from __future__ import annotations

from dataclasses import dataclass

from placement.hardware_profile import Compute, HardwareProfile
from placement.homes import Homes
from placement.model_spec import LayerSpec, LinearSpec, ModelSpec
from placement.passes import Pass

_BYTES_OF_ACTIVATION = 2
_MOST_SAVED = 0.5


@dataclass(frozen=True)
class DenseCost:
    """One decoder layer without its routed experts.

    Attributes:
        dense_s: linear layers.
        attention_s: attention.
        overhead_s: the rest.
        link_s: activations that cross between devices.
        on_gpu: whether the linear layers run on the accelerator.
        gpu_busy_s: of these seconds, on the accelerator.
    """

    dense_s: float
    attention_s: float
    overhead_s: float
    link_s: float
    on_gpu: bool
    gpu_busy_s: float

    @property
    def total_s(self) -> float:
        """The layer; nothing in it runs at the same time."""
        return self.dense_s + self.attention_s + self.overhead_s + self.link_s


def linears_s(linears: tuple[LinearSpec, ...], device: Compute, rows: int) -> float:
    """Seconds of linear layers of a device for `rows` tokens."""
    return sum(
        device.linear(one.format).seconds(one.weights, rows, one.count, one.rows + one.columns) for one in linears
    )


def attention_s(layer: LayerSpec, device: Compute, work: Pass) -> float:
    """Seconds of a layer's attention on a device."""
    if layer.attention_values == 0:
        return 0.0
    kv_nbytes = work.batch * work.visible_tokens(layer.window_tokens) * layer.kv_nbytes_per_token
    pairs = work.batch * work.attended_pairs(layer.window_tokens)
    flops, scores = 2.0 * layer.attention_values * pairs, layer.attention_heads * pairs
    if work.new_tokens == 1:
        return device.decode_attention_s(kv_nbytes, flops, layer.kv_format, scores)
    return device.attention.seconds(kv_nbytes, flops, work.new_tokens, scores)


def layer_cost(
    spec: ModelSpec, layer: LayerSpec, profile: HardwareProfile, work: Pass, *, dense_vram: bool, kv_vram: bool
) -> DenseCost:
    """The cost of one decoder layer without its experts.

    Attention runs where the KV cache is: queries and results cross where that is not where the layer is.

    Args:
        spec: the model.
        layer: one of its layers.
        profile: the machine.
        work: the pass.
        dense_vram: dense weights are in VRAM.
        kv_vram: and so is the KV cache.
    """
    device = _device(profile, vram=dense_vram)
    dense = linears_s(layer.linears, device, work.rows)
    attention = attention_s(layer, _device(profile, vram=kv_vram), work)
    overheads = device.overheads_in(layer.dense_format)
    overhead = overheads.of_layer(work.new_tokens) + overheads.element_s * work.rows * spec.hidden_size
    # What layers in a row save they save of their products' calls: never all of a layer.
    overhead = max(overhead, -_MOST_SAVED * (dense + attention))
    crossing = _crossing_s(spec, profile, work.rows) if dense_vram and not kv_vram and layer.attention_values else 0.0
    busy = (dense + overhead if dense_vram else 0.0) + (attention if kv_vram else 0.0)
    return DenseCost(dense, attention, overhead, crossing, dense_vram, busy)


def pass_cost(spec: ModelSpec, profile: HardwareProfile, homes: Homes, work: Pass) -> tuple[float, float]:
    """(seconds of the output layer, overhead of the pass); logits are computed for the last token of each sequence.

    The overhead is that of the device which has dense layers; where both have some, the accelerator's, which the others
    wait for.
    """
    if spec.head is None:
        raise ValueError(f"{spec.name}: the spec has sizes only, no layers to predict from")
    head_s = linears_s((spec.head,), _device(profile, vram=homes.head_in_vram), work.batch)
    format = next((layer.dense_format for layer in spec.layers if layer.linears), None)
    return head_s, _device(profile, vram=bool(homes.dense_in_vram)).overheads_in(format).pass_s


def streamed_s(spec: ModelSpec, profile: HardwareProfile, homes: Homes) -> float:
    """Seconds in which the link carries the dense weights that stream through the accelerator's memory in a pass."""
    if not homes.dense_streamed:
        return 0.0
    if profile.to_gpu is None:
        raise ValueError(f"{profile.name} has no accelerator")
    return sum(profile.to_gpu.seconds(spec.layers[index].dense_nbytes) for index in homes.dense_streamed)


def _crossing_s(spec: ModelSpec, profile: HardwareProfile, rows: int) -> float:
    """There and back: activations of a pass between the devices."""
    if profile.to_gpu is None or profile.from_gpu is None:
        raise ValueError(f"{profile.name} has no accelerator")
    nbytes = rows * spec.hidden_size * _BYTES_OF_ACTIVATION
    return profile.to_gpu.seconds(nbytes) + profile.from_gpu.seconds(nbytes)


def _device(profile: HardwareProfile, *, vram: bool) -> Compute:
    if not vram:
        return profile.cpu
    if profile.gpu is None:
        raise ValueError(f"{profile.name} has no accelerator")
    return profile.gpu
