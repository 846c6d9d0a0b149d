"""Floor 3: images from nothing but a trained model, for calibrating and training without the data."""
