"""Floor 1: Numba kernels for CPUs, each with its wrapper and its torch reference."""
