"""The seam to transformers: skeletons, dense weights, the experts interface, the returned model."""
