"""Floor 4: how many bits each layer gets."""
