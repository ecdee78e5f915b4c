"""Triton kernels: experts and linear layers on the same bytes as the CPU's, combine, attention in parts."""
