"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from prefetch.policies.arc import ArcPolicy
from prefetch.policies.base import CachePolicy
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.frequency_recency import FrequencyRecencyPolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.lfu import LfuPolicy
from prefetch.policies.lru import LruPolicy
from prefetch.policies.mrs import MrsPolicy
from prefetch.policies.names import DEFAULT_POLICY
from prefetch.policies.quotas import QuotaPolicy
from prefetch.policies.windows import WindowPolicy

_MAKERS: dict[str, Callable[[Geometry], CachePolicy]] = {
    "forecast": ForecastPolicy,
    "lru": lambda geometry: LruPolicy(),
    "lfu": LfuPolicy,
    "mrs": MrsPolicy,
    "window": WindowPolicy,
    "frequency-recency": FrequencyRecencyPolicy,
    "arc": lambda geometry: ArcPolicy(),
    "lfu-quotas": lambda geometry: QuotaPolicy(LfuPolicy(geometry), geometry),
    "lfu-shallow-first": lambda geometry: QuotaPolicy(LfuPolicy(geometry), geometry, whole_layers=1),
}


class UnknownPolicyError(ValueError):
    """No policy has this name."""


def make_policy(name: str, geometry: Geometry) -> CachePolicy:
    """An empty policy.

    Raises:
        UnknownPolicyError: `name` is neither "auto" nor one of `prefetch.policies.names.POLICIES`.
    """
    maker = _MAKERS.get(DEFAULT_POLICY if name == "auto" else name)
    if maker is None:
        raise UnknownPolicyError(f"policy {name!r}: expected auto or one of {', '.join(_MAKERS)}")
    return maker(geometry)
