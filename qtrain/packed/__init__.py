"""The packed student: the file that leaves qtrain, and what loads it again."""
