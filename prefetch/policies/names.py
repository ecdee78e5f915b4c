"""Names of policies, for those who check them without loading any."""

from __future__ import annotations

DEFAULT_POLICY = "forecast"
"""What "auto" stands for."""

POLICIES = (
    "forecast",
    "lru",
    "lfu",
    "mrs",
    "window",
    "frequency-recency",
    "arc",
    "lfu-quotas",
    "lfu-shallow-first",
)
"""What `prefetch.policies.named.make_policy` knows, beside "auto"."""
