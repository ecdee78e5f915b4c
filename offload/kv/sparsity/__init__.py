"""Attention to a part of the KV cache: opt-in, lossy, every method behind one interface."""
