"""Observers: they collect statistics of a tensor, from which the range to represent follows."""
