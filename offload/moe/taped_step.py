"""The MoE step of a tape that has chosen experts: what is here is computed while misses load, as in `moe_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from offload.moe.step import StepWatch, as_they_come
from offload.tiers.expert_tier import ExpertTier


def taped_step(
    first_key: int,
    experts: Sequence[int],
    addresses: npt.NDArray[np.int64],
    compute: Callable[[], None],
    tier: ExpertTier,
    watch: StepWatch | None = None,
) -> None:
    """Let a tape compute a layer's routed experts as they come, every expert read at most once.

    Args:
        first_key: of the layer's experts.
        experts: those that are routed to, each once.
        addresses: int64 [experts of the layer], all 0; where bundles lie while they are computed, and all 0 again.
        compute: computes those experts that have an address.
        tier: where the experts are or come to be.
        watch: told of the step; None where nobody wants to know.

    Raises:
        StorageError, StoreCorruptError: an expert could not be read; the tier is as before the step.
    """

    def compute_some(keys: list[int]) -> None:
        places = [key - first_key for key in keys]
        addresses[places] = tier.addresses(keys)
        compute()
        addresses[places] = 0

    try:
        borrowed, missing = tier.borrow([first_key + expert for expert in experts])
        as_they_come(tier, borrowed, missing, compute_some, watch)
    except BaseException:
        addresses[:] = 0
        tier.abandon()
        raise
