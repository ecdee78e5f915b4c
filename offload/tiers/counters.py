"""What a tier of experts counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TierCounters:
    """What a tier did since it was made.

    Attributes:
        hits: routed experts found resident, once per layer and step.
        misses: routed experts that had to be read.
        evictions: experts that gave up their slot.
        loads: reads that completed.
        stall_s: seconds that steps waited for reads.
        late_stall_s: those of them in which all that was waited for had been read ahead, too late.
        ahead_issued: reads ahead that were started.
        ahead_used: those that were there when their expert was routed.
        ahead_late: those that were still on their way then.
        ahead_wasted: those that left, were cancelled or failed before their expert was routed.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    stall_s: float = 0.0
    late_stall_s: float = 0.0
    ahead_issued: int = 0
    ahead_used: int = 0
    ahead_late: int = 0
    ahead_wasted: int = 0
