"""Whether an exported student computes what was trained, layer by layer."""
