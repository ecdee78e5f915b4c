"""Names of schedulers, for those who check them without loading any."""

from __future__ import annotations

SCHEDULERS = ("auto", "off")
"""What `prefetch.scheduler.named.make_scheduler` knows."""
