"""Floor 0: the packed byte layouts that every tier shares (numpy only)."""
