"""Checkpoints by their headers: where every tensor and every expert lies, with nothing materialised."""
