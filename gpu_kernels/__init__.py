"""Floor 1: Triton kernels. None yet: the GPU tier is not built, and nothing here pretends to be."""
