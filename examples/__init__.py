"""Runnable examples: a small trained model and a writer of random checkpoints of any size."""
