"""Floor 3, convert: which way each weight of a calibrated student is rounded."""
