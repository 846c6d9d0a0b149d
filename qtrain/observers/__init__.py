"""What was seen of a tensor, and the range to represent that follows from it."""
