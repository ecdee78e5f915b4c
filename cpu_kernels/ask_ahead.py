# mypy: allow-untyped-defs
"""Asking for memory that will be read soon, all of it at once: one miss after the other takes ten times as long."""

from __future__ import annotations

from cpu_kernels.cache_lines import ask_for_line
from cpu_kernels.jit import entry


@entry("void(int64[::1])")
def ask_ahead(addresses):
    """Ask for one cache line at each of some addresses, which need not exist: nothing is read."""
    for index in range(len(addresses)):
        ask_for_line(addresses[index])
