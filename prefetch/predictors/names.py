"""Names of what predictors go by, for those who check them without loading any."""

from __future__ import annotations

SOURCES = ("router", "transition", "previous", "popularity")
"""What `prefetch.predictors.predictor.Predictor` can go by alone; "auto" is all of it, and the policy's word."""
