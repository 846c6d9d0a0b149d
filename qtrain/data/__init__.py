"""What is trained, validated, calibrated and tested on, and in which order."""
