"""Routing traces: records, their file format, synthetic ones, and replay against a cache."""
