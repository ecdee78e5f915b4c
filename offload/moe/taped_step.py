"""The MoE step of a tape that has chosen experts: what is here is computed while misses load, as in `moe_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from offload.moe.in_order import borrowed_in_order
from offload.moe.step import StepWatch, as_they_come
from offload.tiers.expert_tier import ExpertTier


def taped_step(
    first_key: int,
    experts: Sequence[int],
    addresses: npt.NDArray[np.int64],
    compute: Callable[[], None],
    tier: ExpertTier,
    watch: StepWatch | None = None,
    *,
    in_turn: bool = False,
) -> None:
    """Let a tape compute a layer's routed experts as they come, every expert read at most once.

    Args:
        first_key: of the layer's experts.
        experts: those that are routed to, ascending.
        addresses: int64 [experts of the layer], all 0; where bundles lie while they are computed, and all 0 again.
        compute: computes those experts that have an address.
        tier: where the experts are or come to be.
        watch: told of the step; None where nobody wants to know.
        in_turn: see `moe_step`.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read; the tier is as before the step.
    """

    def compute_some(keys: list[int]) -> None:
        places = [key - first_key for key in keys]
        addresses[places] = tier.addresses(keys)
        compute()
        addresses[places] = 0

    keys = [first_key + expert for expert in experts]
    try:
        if in_turn:
            begun = None if watch is None else watch.loads_started
            for group in borrowed_in_order(tier, keys, None, [1] * len(keys), len(keys), begun):
                compute_some(group)
        else:
            borrowed, missing = tier.borrow(keys)
            as_they_come(tier, borrowed, missing, compute_some, watch)
    except BaseException:
        addresses[:] = 0
        tier.abandon()
        raise
