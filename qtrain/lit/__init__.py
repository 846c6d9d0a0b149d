"""Floor 5: what Lightning runs."""
