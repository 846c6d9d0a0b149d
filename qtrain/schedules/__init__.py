"""Floor 1: a number as a function of progress."""
