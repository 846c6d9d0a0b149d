"""Floor 1: one quantizer a file."""
