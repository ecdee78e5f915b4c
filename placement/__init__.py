"""Floor 2: records and planning. Pure: no torch, no input or output."""
