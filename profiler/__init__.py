"""Floor 3: what this machine has and how fast it is."""
