"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from prefetch.policies.arc import ArcPolicy
from prefetch.policies.base import CachePolicy
from prefetch.policies.frequency_recency import FrequencyRecencyPolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.lfu import LfuPolicy
from prefetch.policies.lru import LruPolicy
from prefetch.policies.mrs import MrsPolicy
from prefetch.policies.quotas import QuotaPolicy
from prefetch.policies.windows import WindowPolicy

_MAKERS: dict[str, Callable[[Geometry], CachePolicy]] = {
    "lru": lambda geometry: LruPolicy(),
    "lfu": LfuPolicy,
    "mrs": MrsPolicy,
    "window": WindowPolicy,
    "frequency-recency": FrequencyRecencyPolicy,
    "arc": lambda geometry: ArcPolicy(),
    "lfu-quotas": lambda geometry: QuotaPolicy(LfuPolicy(geometry), geometry),
    "lfu-shallow-first": lambda geometry: QuotaPolicy(LfuPolicy(geometry), geometry, whole_layers=1),
}

POLICIES: tuple[str, ...] = tuple(_MAKERS)
"""Names that `make_policy` knows."""


class UnknownPolicyError(ValueError):
    """No policy has this name."""


def make_policy(name: str, geometry: Geometry) -> CachePolicy:
    """An empty policy.

    Raises:
        UnknownPolicyError: `name` is none of POLICIES.
    """
    maker = _MAKERS.get(name)
    if maker is None:
        raise UnknownPolicyError(f"policy {name!r}: expected one of {', '.join(POLICIES)}")
    return maker(geometry)
