"""Synthetic images, made from a trained model alone, for calibration and training without the data."""
