"""What the scheduler is told of a layer: seconds of its experts, the CPU's and the disk's as observed."""

from __future__ import annotations

from offload.devices.link import Link
from prefetch.scheduler.records import LayerCosts

_CPU_BYTES_PER_S = 10e9
_DISK_BYTES_PER_S = 2e9
"""What is assumed until something was observed."""

_NEWEST_SHARE = 0.1


class ObservedCosts:
    """Running means of what the CPU and the disk did. A schedule depends on them, what is computed does not.

    Attributes:
        cpu_s_per_byte: seconds that the CPU's experts take for a byte of weights, with one to a few tokens each.
        disk_s_per_byte: seconds of waiting for a byte that reads bring.
    """

    def __init__(self, link: Link, accelerator_bytes_per_s: float) -> None:
        self.cpu_s_per_byte = 1 / _CPU_BYTES_PER_S
        self.disk_s_per_byte = 1 / _DISK_BYTES_PER_S
        self._link = link
        self._accelerator_bytes_per_s = accelerator_bytes_per_s

    def saw_cpu(self, nbytes: int, seconds: float) -> None:
        """The CPU computed experts of `nbytes` bytes."""
        if nbytes:
            self.cpu_s_per_byte += _NEWEST_SHARE * (seconds / nbytes - self.cpu_s_per_byte)

    def saw_disk(self, nbytes: int, seconds: float) -> None:
        """A step waited for reads of `nbytes` bytes."""
        if nbytes:
            self.disk_s_per_byte += _NEWEST_SHARE * (seconds / nbytes - self.disk_s_per_byte)

    def of_layer(self, bundle_nbytes: int) -> LayerCosts:
        """Seconds for experts of this size.

        A token costs the CPU a sixteenth of reading the weights: kernels read them once for all tokens of an expert,
        and up to about that many tokens the reading is what takes time.
        """
        cpu_expert_s = bundle_nbytes * self.cpu_s_per_byte
        return LayerCosts(
            cpu_token_s=cpu_expert_s / 16,
            cpu_expert_s=cpu_expert_s,
            gpu_expert_s=bundle_nbytes / self._accelerator_bytes_per_s,
            link_expert_s=self._link.copy_s(bundle_nbytes),
            disk_expert_s=bundle_nbytes * self.disk_s_per_byte,
        )
