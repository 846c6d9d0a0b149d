"""Floor 3, data: what is trained, validated, calibrated and tested on, and in which order."""
