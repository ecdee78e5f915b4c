"""What `offload profile` says of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.cli.output import add_row, table
from offload.sizes import format_size
from placement.datasheets import bits_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.hardware_profile import Compute, HardwareProfile, Link, Overheads

_MANY = 128


def gpu_facts(profile: HardwareProfile) -> dict[str, str]:
    """Facts by name; none without a GPU."""
    gpu, up, down = profile.gpu, profile.to_gpu, profile.from_gpu
    if gpu is None or up is None or down is None:
        return {}
    packed = gpu.packed_overheads
    return {
        "GPU memory": f"{format_size(gpu.memory_nbytes)} free, read at {speed(gpu.memory_bytes_per_s)}",
        "to the GPU": f"{_link(up)}; {format_size(profile.pinned_nbytes)} of RAM may be pinned",
        "from the GPU": _link(down),
        "a pass on the GPU": _pass(gpu.overheads),
        **({} if packed is None else {"a packed pass on it": _pass(packed)}),
    }


def _link(link: Link) -> str:
    return (
        f"{speed(link.bytes_per_s)}, {speed(link.overlapped_bytes_per_s)} beside CPU kernels, "
        f"{link.latency_s * 1e6:.0f} us a copy"
    )


def _pass(known: Overheads) -> str:
    return f"{known.pass_s * 1e3:.2f} ms and {known.layer_s * 1e6:.0f} us a layer beyond products and attention"


def gpu_kernels(gpu: Compute) -> RenderableType:
    """Bytes of weights per second at one token, without what a call takes, and products per second at many."""
    made = table(
        "on the GPU", "experts, 1 token", f"experts, {_MANY} tokens", "linear, 1 token", f"linear, {_MANY} tokens"
    )
    for one in gpu.experts:
        cells = []
        for curve in (one.curve, gpu.linear(one.format)):
            cells.append(speed(bits_of(one.format) / 8 / curve.seconds_per_weight(1)))
            cells.append(f"{2 * _MANY / curve.seconds_per_weight(_MANY) / 1e12:.2f} TFLOP/s")
        add_row(made, one.format, *cells)
    return made


def speed(bytes_per_s: float) -> str:
    """In GB/s."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"
