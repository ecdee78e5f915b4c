"""Decode steps of transformers models as graphs."""
