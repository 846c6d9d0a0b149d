"""Floor 3: the objective of training and its terms."""
