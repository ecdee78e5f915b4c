"""Run Mixture-of-Experts transformers models that do not fit in memory."""
