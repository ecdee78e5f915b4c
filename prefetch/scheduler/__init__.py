"""The intra-layer scheduler: which expert of a layer runs where, and what moves meanwhile."""
