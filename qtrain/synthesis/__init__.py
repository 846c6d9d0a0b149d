"""Images from nothing but a trained model, for calibrating and training without the data."""
