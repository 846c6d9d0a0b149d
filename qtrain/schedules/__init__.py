"""A number as a function of progress."""
