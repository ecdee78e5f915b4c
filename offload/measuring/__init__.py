"""The runtime as the profiler measures it: its kernels, its reader and whole forward passes."""
