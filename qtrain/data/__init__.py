"""Images for training, validation, calibration and testing, and their order."""
