"""Floor 1: what was seen of a tensor, and the range to represent that follows from it."""
