"""A KV cache in blocks: in RAM while the budget lasts, beyond it on disk, attended where it lies."""
