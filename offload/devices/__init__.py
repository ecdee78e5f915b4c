"""Devices: where slabs are allocated and experts computed."""
