"""Floor 6: what the task `sweep` is made of: the engine, the search, and what one sees of it."""
