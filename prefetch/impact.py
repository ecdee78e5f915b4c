"""What it is worth to have an expert on the GPU when its layer comes (HybriMoE, arXiv 2504.05897, section 4.3)."""

from __future__ import annotations

import numpy as np

from prefetch.policies.base import CachePolicy
from prefetch.scheduler.records import Floats, Home, Ints
from prefetch.scheduler.scheduler import LayerScheduler

UNKNOWN_PROBABILITY = 0.5
"""Of a victim's being needed where the cache policy has no opinion."""


def best_copy(scheduler: LayerScheduler, loads: Ints, homes: Ints, probabilities: Floats) -> tuple[int, float]:
    """The expert in RAM that saves most if it is on the GPU when its layer comes.

    Args:
        scheduler: with the layer's costs.
        loads: int64 [n], tokens of the experts that the layer is expected to need.
        homes: int64 [n], where they are.
        probabilities: float64 [n], how probably each is needed.

    Returns:
        (its place, seconds that the layer's schedule is shorter with it x its probability); place -1 where none saves
        any.
    """
    without_s = scheduler.schedule(loads, homes).makespan_s
    best, best_s = -1, 0.0
    for place in np.flatnonzero(homes == Home.RAM).tolist():
        trial = homes.copy()
        trial[place] = Home.BOTH
        gain_s = (without_s - scheduler.schedule(loads, trial).makespan_s) * float(probabilities[place])
        if gain_s > best_s:
            best, best_s = place, gain_s
    return best, best_s


def loss_s(scheduler: LayerScheduler, policy: CachePolicy, victim: int, key: int, probability: float) -> float:
    """Expected seconds that a victim's absence costs: a miss, times how probably it is needed.

    Args:
        scheduler: with the costs of a layer.
        policy: of the tier; on its own scale the victim and `key` are seen alike, how soon they are needed included.
        victim: key of the expert that would leave.
        key: the expert that would come.
        probability: that `key` is needed.
    """
    one = np.ones(1, np.int64)
    miss_s, hit_s = (scheduler.schedule(one, [home]).makespan_s for home in (Home.RAM, Home.VRAM))
    gain, loss = policy.worth(key), policy.worth(victim)
    if gain is None or loss is None:
        chance = UNKNOWN_PROBABILITY
    else:
        chance = min(1.0, probability * loss / gain) if gain > 0 else 1.0
    return chance * (miss_s - hit_s)
