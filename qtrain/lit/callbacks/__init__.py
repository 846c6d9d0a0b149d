"""Floor 5: what happens around the training step."""
