"""Lightning callbacks, which act around the training step."""
