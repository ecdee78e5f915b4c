"""Floor 1: cache policies, predictors, the intra-layer scheduler."""
