"""What leaves qtrain: the packed student, and what loads it."""
